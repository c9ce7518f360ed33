"""Ask one conversation of this project, of transformers and of llama.cpp: the same token ids, the same greedy answer?

For the base model, for a LoRA file merged into it, and for the file as an adapter, by the scripts that users run.
"""

import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from lit_llama.cli import run
from lit_llama.errors import UserError
from lit_llama.finetuned import read_finetuned
from lit_llama.generation import Sampling, generate
from lit_llama.model_folder import QUICKSTART_MODEL, find_model, load_model, own_template
from lit_llama.prompt import Message, encode, find_template, stop_ids
from lit_llama.tokenizer import find_tokenizer

from transformers import AutoModelForCausalLM, AutoTokenizer

CONVERSATION = [
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris, with about 2,100,000 people."),
    Message("user", "And of Italy? Tell me in four sentences what to see there."),
]
Answer = tuple[list[int], str]  # the ids of the prompt, and the text

SCRIPTS = Path(__file__).parents[1]


class LlamaCpp:
    """llama.cpp with one model, by its server; all in float32, as in this project."""

    def __init__(self, model: Path, lora: Path | None = None) -> None:
        try:
            library = import_module("xllamacpp")
        except ImportError:
            raise UserError("llama.cpp is not installed; run: pip install -e '.[llamacpp]'") from None
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

    def answer(self, ids: list[int], max_new_tokens: int) -> str:
        return self.post("/completion", prompt=ids, temperature=0, n_predict=max_new_tokens)["content"]


def main(
    checkpoint_path: Path | None = None,
    lora_path: Path | None = None,
    prompt_style: str | None = None,
    max_new_tokens: int = 60,
) -> None:
    """Print the answers and whether they agree; the exit status is not 0 if they do not.

    Args:
        checkpoint_path: The base model. Default: checkpoints/lit-llama/SmolLM2-135M-Instruct, or else the model
            written last.
        lora_path: A file that finetune_lora.py wrote.
        prompt_style: The template for the base model. By default its own.
        max_new_tokens: The longest answer, in tokens.
    """
    checkpoint_path = find_model(checkpoint_path, QUICKSTART_MODEL)
    base_style = find_template(prompt_style, own_template(checkpoint_path), "plain")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        agree = [compare("base model", checkpoint_path, folder / "base", base_style, max_new_tokens)]
        if lora_path:
            run_script("merge_lora", folder / "merged", lora_path=lora_path, pretrained_path=checkpoint_path)
            style = read_finetuned(lora_path, "lora").prompt_style
            agree += [compare("merged", folder / "merged" / "lit-llama.pth", folder / "out", style, max_new_tokens)]
            base = {"checkpoint_path": checkpoint_path, "dtype": "F32"}
            run_script("export_gguf", folder / "base-f32", **base, prompt_style=style)
            gguf = folder / "base-f32" / "model-F32.gguf"
            run_script("export_gguf", folder / "lora", **base, lora_path=lora_path, base_model=gguf)
            llama = LlamaCpp(gguf, folder / "lora" / "lora-F32.gguf")
            agree += [
                report(
                    "LoRA as an adapter",
                    {
                        "Lit-LLaMA": answer_here(folder / "merged" / "lit-llama.pth", style, max_new_tokens),
                        "llama.cpp": answer_of_llamacpp(llama, max_new_tokens),
                    },
                )
            ]
    if not all(agree):
        sys.exit("error: not all of them agree")


def run_script(name: str, out_dir: Path, **flags: object) -> None:
    """Run one of the scripts that users run, as they would."""
    words = [f"--{flag}={value}" for flag, value in {"out_dir": out_dir, **flags}.items()]
    subprocess.run([sys.executable, str(SCRIPTS / f"{name}.py"), *words], check=True)


def compare(title: str, checkpoint: Path, folder: Path, style: str, max_new_tokens: int) -> bool:
    run_script("export_hf", folder / "hf", checkpoint_path=checkpoint, prompt_style=style)
    run_script("export_gguf", folder / "gguf", checkpoint_path=checkpoint, dtype="F32", prompt_style=style)
    llama = LlamaCpp(folder / "gguf" / "model-F32.gguf")
    return report(
        title,
        {
            "Lit-LLaMA": answer_here(checkpoint, style, max_new_tokens),
            "transformers": answer_of_transformers(folder / "hf", max_new_tokens),
            "llama.cpp": answer_of_llamacpp(llama, max_new_tokens),
        },
    )


def answer_here(checkpoint: Path, style: str, max_new_tokens: int) -> Answer:
    tokenizer = find_tokenizer(checkpoint)
    ids = encode(style, CONVERSATION, tokenizer).ids
    sampling = Sampling(max_new_tokens, temperature=0)
    answer = [*generate(load_model(checkpoint).float().eval(), ids, sampling, stop_ids(style, tokenizer))]
    return ids, tokenizer.decode(answer)


def answer_of_transformers(folder: Path, max_new_tokens: int) -> Answer:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    messages = [{"role": message.role, "content": message.content} for message in CONVERSATION]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    output = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)[0]
    return ids, tokenizer.decode(output[len(ids) :], skip_special_tokens=True)


def answer_of_llamacpp(llama: LlamaCpp, max_new_tokens: int) -> Answer:
    ids = llama.encode([{"role": message.role, "content": message.content} for message in CONVERSATION])
    return ids, llama.answer(ids, max_new_tokens)


def report(title: str, answers: dict[str, Answer]) -> bool:
    """Print what each program made of the conversation; returns whether it is the same."""
    same = all(answer == answers["Lit-LLaMA"] for answer in answers.values())
    print(f"{title}: {'the same ids and the same answer' if same else 'DIFFERENT'}")
    for program, (ids, text) in answers.items():
        print(f"  {program:12} {len(ids)} ids, {ids[:8]}...: {text!r}")
    return same


if __name__ == "__main__":
    run(main)
