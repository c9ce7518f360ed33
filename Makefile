# make quickstart   finetune a real LLaMA with LoRA on this machine, in a few minutes
# make check        lint, types and the tests that take less than a second each: about a minute
# make test         lint, types and all tests
# make lab          experiments on LoRA, with tables and pictures in out/lab (up to 40 minutes on 2 cores)
# make figures      measure every figure of README and guides again (two hours on 2 cores)
# make fuzz         damage every kind of file that is read, for an hour, and count what comes of it
# make format       format the code
# make clean        remove the environment and what make quickstart has made, no other checkpoint or result

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

MODEL = checkpoints/lit-llama/SmolLM2-135M-Instruct
RUN = out/lora/quickstart

.PHONY: quickstart lab check test figures fuzz format clean

# Every line can be typed by hand, after: source .venv/bin/activate
quickstart: .venv/quickstart
	python scripts/download_smollm2.py --out_dir $(MODEL)
	python scripts/prepare_json.py --train_file data/ml_questions/train.json \
	  --validation_file data/ml_questions/validation.json --prompt_style chatml \
	  --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart
	rm -rf $(RUN)
	python finetune_lora.py --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart --out_dir $(RUN) \
	  --lora_r 32 --lora_alpha 64 --lora_targets query,key,value,projection,mlp --lora_dropout 0 \
	  --learning_rate 2e-3 --warmup_steps 10 --lr_schedule linear --batch_size 4 --num_epochs 1 \
	  --eval_interval 1000 --log_interval 20
	@echo; echo 'Before:'
	python generate.py --checkpoint_path $(MODEL)/lit-llama.pth --prompt_style chatml \
	  --prompt_file data/ml_questions/questions.txt --temperature 0 --max_new_tokens 60
	@echo; echo 'After:'
	python generate_lora.py --pretrained_path $(MODEL)/lit-llama.pth \
	  --lora_path $(RUN) \
	  --prompt_file data/ml_questions/questions.txt --temperature 0 --max_new_tokens 60
	@echo; echo 'The losses are drawn in $(RUN)/loss.png. Next, ask it something of your own:'
	@echo 'source .venv/bin/activate'
	@echo 'python generate_lora.py --pretrained_path $(MODEL)/lit-llama.pth \'
	@echo '  --lora_path $(RUN) --prompt "In one sentence, what is overfitting?"'

lab: .venv/quickstart
	python scripts/download_smollm2.py --out_dir $(MODEL)
	python scripts/prepare_json.py --train_file data/ml_questions/train.json \
	  --validation_file data/ml_questions/validation.json --prompt_style chatml \
	  --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart
	python scripts/lab/lora_lab.py --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart

check: .venv/test
	ruff format --check .
	ruff check .
	pyrefly check
	pytest -q -n auto -m "not slow"

test: .venv/test
	ruff format --check .
	ruff check .
	pyrefly check
	pytest -q -n auto --dist loadfile

figures: .venv/test
	python scripts/dev/figures.py

fuzz: .venv/test
	PYTHONPATH=.:scripts:tests:tests/scripts TOKENIZERS_PARALLELISM=false python tests/fuzz.py --seconds 3600

format: .venv/test
	ruff format .
	ruff check --fix .

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache data/quickstart $(RUN) $(MODEL)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart: pyproject.toml constraints.txt | .venv/bin/python
	pip install --quiet --constraint constraints.txt --editable '.[gguf,plot]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
