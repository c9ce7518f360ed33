"""Do other programs make of our exports what we do: the same token ids, greedy answer and logits?

Asked are releases of transformers, each in an environment of its own, and llama.cpp, where it is installed; for a
model, for a LoRA file merged into it and as llama.cpp's adapter, and for small models that stretch rotary embedding.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.generation import Sampling, generate
from lit_llama.model import LLAMA_3_SCALING, LLaMA, LLaMAConfig, RopeScaling
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model, own_template, save_model_folder
from lit_llama.prompt import Message, encode, find_template, stop_ids
from lit_llama.tokenizer import Tokenizer, find_tokenizer

import torch

CONVERSATION = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, with about 2,100,000 people."),
    Message("user", "And of Italy? Tell me in four sentences what to see there."),
]
N_TOKENS = 200  # of the text whose logits are compared: longer than what the small models are stretched from
SMALL = LLaMAConfig(n_layer=2, n_head=8, n_kv_head=2, n_embd=128, block_size=512, rope_base=5e5)
STRETCHED = {
    "Llama 3.1's rotary embedding": replace(SMALL, rope_scaling=replace(LLAMA_3_SCALING, original_block_size=64)),
    "a linearly stretched one, a tied head": replace(SMALL, tie_embeddings=True, rope_scaling=RopeScaling(4.0)),
}
TRANSFORMERS = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, messages, text, n = json.load(sys.stdin)
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).float()
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
ids = prompt["input_ids"][0].tolist()
output = model.generate(**prompt, do_sample=False, max_new_tokens=n)[0]
logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].tolist()
print(json.dumps([ids, tokenizer.decode(output[len(ids) :], skip_special_tokens=True), logits]))
"""
Answer = tuple[list[int], str, list[float]]  # the ids of the prompt, the answer, logits after a text (or none)

SCRIPTS = Path(__file__).parents[1]


class LlamaCpp:
    """llama.cpp with one model, by its server; all in float32, as in this project."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        library = import_module("xllamacpp")
        settings = library.CommonParams()
        settings.model.path = str(model)
        settings.lora_adapters = [library.CommonAdapterLoraInfo(str(lora), 1.0)] if lora else []
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 1024, 1, 0, 0
        settings.fit_params = settings.warmup = False
        settings.cache_type_k = settings.cache_type_v = library.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = library.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.server = library.Server(settings)

    def post(self, path: str, **fields: Any) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        request = Request(self.server.listening_address + path, json.dumps(fields).encode(), headers)
        try:
            with urlopen(request) as reply:
                return json.load(reply)
        except HTTPError as error:
            raise UserError(f"llama.cpp could not do {path}: {error.read().decode()}") from None

    def encode(self, messages: list[dict[str, str]]) -> list[int]:
        """The ids of a conversation, rendered by the template inside the GGUF."""
        text = self.post("/apply-template", messages=messages)["prompt"]
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def answer(self, max_new_tokens: int) -> Answer:
        ids = self.encode(as_dicts())
        text = self.post("/completion", prompt=ids, temperature=0, n_predict=max_new_tokens)["content"]
        return ids, text, []


def main(
    checkpoint_path: Path | None = None,
    lora_path: Path | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 60,
    transformers: tuple[str, ...] = ("4.46.3", "5.24.0"),
    environments_dir: Path = Path("out/environments"),
) -> None:
    """Print the answers and whether they agree; the exit status is not 0 if they do not.

    Args:
        checkpoint_path: The base model. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        lora_path: A file that finetune_lora.py wrote.
        prompt_style: The template for the base model. By default its own.
        max_new_tokens: The longest answer, in tokens.
        transformers: The releases, which are installed beside this environment's torch.
        environments_dir: Where they are installed, the first time.
    """
    checkpoint_path = find_model(checkpoint_path, QUICKSTART_MODEL)
    style = find_template(prompt_style, own_template(checkpoint_path), "plain")
    tokenizer = find_tokenizer(checkpoint_path)
    readers = {f"transformers {version}": install(version, environments_dir) for version in transformers}
    has_llamacpp = find_spec("xllamacpp") is not None
    if not has_llamacpp:
        print("llama.cpp is left out; to ask it, too, run: pip install -e '.[llamacpp]'", file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def compare(title: str, model_dir: Path, style: str) -> bool:
            exported = folder / title
            run_script("export_hf", exported / "hf", checkpoint_path=model_dir, prompt_style=style)
            answers = {"Lit-LLaMA": answer_here(model_dir, style, max_new_tokens)}
            for program, path in readers.items():
                answers[program] = answer_of_transformers(exported / "hf", path, tokenizer, max_new_tokens)
            if has_llamacpp:
                run_script("export_gguf", exported / "gguf", checkpoint_path=model_dir, dtype="F32", prompt_style=style)
                answers["llama.cpp"] = LlamaCpp(exported / "gguf" / "model-F32.gguf").answer(max_new_tokens)
            return report(title, answers)

        agree = [compare("base model", checkpoint_path.parent, style)]
        for title, config in STRETCHED.items():
            save_random(folder / "small", replace(config, vocab_size=tokenizer.vocab_size), tokenizer)
            agree.append(compare(title, folder / "small", style))
        if lora_path:
            run_script("merge_lora", folder / "merged", lora_path=lora_path, pretrained_path=checkpoint_path)
            style = read_finetuned(lora_path, "lora").prompt_style
            agree.append(compare("merged", folder / "merged", style))
        if lora_path and has_llamacpp:
            base = {"checkpoint_path": checkpoint_path, "dtype": "F32"}
            run_script("export_gguf", folder / "base", **base, prompt_style=style)
            gguf = folder / "base" / "model-F32.gguf"
            run_script("export_gguf", folder / "lora", **base, lora_path=lora_path, base_model=gguf)
            theirs = LlamaCpp(gguf, folder / "lora" / "lora-F32.gguf").answer(max_new_tokens)
            ours = answer_here(folder / "merged", style, max_new_tokens)
            agree.append(report("LoRA as an adapter", {"Lit-LLaMA": ours, "llama.cpp": theirs}))
    if not all(agree):
        sys.exit("error: not all of them agree")


def install(version: str, environments_dir: Path) -> Path:
    """Where a release of transformers is, with the libraries that it asks for; torch is that of this environment."""
    path = environments_dir.absolute() / f"transformers-{version}"
    if not path.is_dir():
        environments_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=environments_dir) as name:
            part = Path(name) / path.name
            command = ["pip", "install", "--quiet", "--target", str(part), f"transformers=={version}"]
            subprocess.run([sys.executable, "-m", *command], check=True)
            part.rename(path)
    return path


def run_script(name: str, out_dir: Path, **flags: object) -> None:
    """Run one of the scripts that users run, as they would."""
    words = [f"--{flag}={value}" for flag, value in {"out_dir": out_dir, **flags}.items()]
    subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), *words], check=True)


def save_random(folder: Path, config: LLaMAConfig, tokenizer: Tokenizer) -> None:
    torch.manual_seed(0)
    model = LLaMA(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    save_model_folder(folder, model.state_dict(), config, tokenizer.files())


def text_of(tokenizer: Tokenizer) -> str:
    """A text of N_TOKENS."""
    words = " ".join(f"{i} {message.content}" for i in range(N_TOKENS) for message in CONVERSATION)
    return tokenizer.decode(tokenizer.encode(words, bos=False)[:N_TOKENS])


def as_dicts() -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in CONVERSATION]


@torch.inference_mode()
def answer_here(model_dir: Path, style: str, max_new_tokens: int) -> Answer:
    tokenizer, model = find_tokenizer(model_dir, model_dir), load_model(model_dir).float().eval()
    ids = encode(style, CONVERSATION, tokenizer).ids
    sampling = Sampling(max_new_tokens, temperature=0)
    answer = [*generate(model, ids, sampling, stop_ids(style, tokenizer))]
    logits = model(torch.tensor([tokenizer.encode(text_of(tokenizer))]))[0, -1]
    return ids, tokenizer.decode(answer), logits.tolist()


def answer_of_transformers(folder: Path, library: Path, tokenizer: Tokenizer, max_new_tokens: int) -> Answer:
    given = json.dumps([str(folder), as_dicts(), text_of(tokenizer), max_new_tokens])
    environment = {**os.environ, "PYTHONPATH": str(library), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", TRANSFORMERS]
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{library.name} could not use the export: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def report(title: str, answers: Mapping[str, Answer]) -> bool:
    """Print what each program made of the conversation; returns whether it is the same."""
    ids, text, logits = answers["Lit-LLaMA"]
    largest = max(map(abs, logits))
    print(f"{title}:")
    agree = []
    for program, (their_ids, their_text, theirs) in answers.items():
        off = max((abs(a - b) for a, b in zip(logits, theirs, strict=bool(theirs))), default=0.0) / largest
        same = their_ids == ids and their_text == text and off < 1e-4
        said = f"logits off by {off:.0e} of the largest, " if theirs else ""
        print(
            f"  {'' if same else 'DIFFERENT: '}{program:18} {said}{len(their_ids)} ids {their_ids[:4]}, {their_text!r}"
        )
        agree.append(same)
    return all(agree)


if __name__ == "__main__":
    run(main)
