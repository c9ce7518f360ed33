# make quickstart   finetune a real LLaMA with LoRA on this machine, in a few minutes
# make check        lint, types and the tests that take less than a second each: about a minute
# make test         lint, types and all tests
# make lab          experiments on LoRA, with tables and pictures in out/lab: those that take ten minutes in all
# make lab-full     all of them; interrupted, it goes on where it stopped
# make figures      measure every figure of README and guides again (two hours on 2 cores)
# make fuzz         damage every kind of file that is read, for an hour, and count what comes of it
# make format       format the code
# make clean        remove the environment and what make quickstart has made, no other checkpoint or result

PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)

MODEL = checkpoints/lit-llama/SmolLM2-135M-Instruct
RUN = out/lora/quickstart

.PHONY: quickstart lab lab-full check test figures fuzz format clean

# Every line can be typed by hand, after: source .venv/bin/activate
quickstart: .venv/quickstart
	python scripts/download_smollm2.py --out_dir $(MODEL)
	python scripts/bookings.py --records_dir data/bookings
	python scripts/prepare_json.py --train_file data/bookings/train.json --val_split_size 20 --prompt_style chatml \
	  --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart
	rm -rf $(RUN)
	python finetune_lora.py --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/quickstart --out_dir $(RUN) \
	  --lora_r 8 --lora_alpha 16 --lora_targets all --lora_dropout 0 \
	  --learning_rate 2e-3 --warmup_steps 5 --lr_schedule linear --batch_size 4 --num_epochs 1 \
	  --eval_interval 10 --log_interval 10
	@echo; echo 'Before:'
	python scripts/bookings.py --score true --checkpoint_path $(MODEL) --n 20 --show 5
	@echo; echo 'Before, with three examples shown first:'
	python scripts/bookings.py --score true --checkpoint_path $(MODEL) --n 20 --shots 3
	@echo; echo 'After:'
	python scripts/bookings.py --score true --checkpoint_path $(MODEL) --lora_path $(RUN) --show 5
	@echo; echo 'The losses are drawn in $(RUN)/loss.png. Next, ask it something of your own:'
	@echo 'source .venv/bin/activate'
	@echo 'python generate_lora.py --pretrained_path $(MODEL)/lit-llama.pth --lora_path $(RUN) --temperature 0 \'
	@echo '  --prompt "Answer in JSON with name, place, people, day, time: A table for two at Nine Pins, Friday 8 pm, Ada."'

# What the experiments train on, and the guides
data/questions/meta.json: .venv/quickstart
	python scripts/download_smollm2.py --out_dir $(MODEL)
	python scripts/prepare_json.py --train_file data/ml_questions/train.json \
	  --validation_file data/ml_questions/validation.json --prompt_style chatml \
	  --pretrained_path $(MODEL)/lit-llama.pth --data_dir data/questions

lab: data/questions/meta.json
	python scripts/lab/lora_lab.py --pretrained_path $(MODEL)/lit-llama.pth --only spectrum first_step merging

lab-full: data/questions/meta.json
	python scripts/lab/lora_lab.py --pretrained_path $(MODEL)/lit-llama.pth

check: .venv/test
	ruff format --check .
	ruff check .
	pyrefly check
	pytest -q -n auto -m "not slow"

test: .venv/test
	ruff format --check .
	ruff check .
	pyrefly check
	pytest -q -n auto --dist loadfile --no-loadscope-reorder

figures: .venv/test
	python scripts/dev/figures.py

fuzz: .venv/test
	PYTHONPATH=.:scripts:tests:tests/scripts TOKENIZERS_PARALLELISM=false python tests/fuzz.py --seconds 3600

format: .venv/test
	ruff format .
	ruff check --fix .

clean:
	rm -rf .venv *.egg-info .pytest_cache .ruff_cache data/quickstart data/bookings data/questions $(RUN) $(MODEL)

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/quickstart: pyproject.toml constraints.txt | .venv/bin/python
	pip install --quiet --constraint constraints.txt --editable '.[gguf,plot]'
	touch $@

.venv/test: pyproject.toml constraints.txt | .venv/bin/python
	pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@
