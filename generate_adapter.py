"""Let a LLaMA that was finetuned with finetune_adapter.py follow an instruction."""

from pathlib import Path

from lit_llama.adapter import cache_prefix, load_adapter
from lit_llama.checkpoint import default_precision, load_model, storage_dtype
from lit_llama.cli import run
from lit_llama.generation import default_device, read_prompts, respond
from lit_llama.tokenizer import find_tokenizer


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    adapter_path: Path = Path("out/adapter/alpaca/lit-llama-adapter-finetuned.pth"),
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    seed: int = 1234,
    precision: str | None = None,
) -> None:
    """Print the response as it comes. Prompt length, start layer and prompt style are those of the adapter file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: Several instructions, one a line, instead.
        adapter_path: The file that finetune_adapter.py wrote.
        pretrained_path: The checkpoint of the base model.
        tokenizer_path: The tokenizer, if it does not lie beside the checkpoint.
        max_new_tokens: The longest response, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens only.
        top_p: Draw from the likeliest tokens that make up this probability only.
        seed: Of the sampling.
        precision: 32-true, bf16-true or 16-true. By default bf16-true on a GPU that has bfloat16, else 32-true.
    """
    dtype = storage_dtype(precision or default_precision())
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    model = load_model(pretrained_path, dtype, default_device())
    prompt_style = load_adapter(model, adapter_path)
    model.to(dtype)
    cache_prefix(model)
    respond(model, tokenizer, prompts, prompt_style, input, seed, max_new_tokens, temperature, top_k, top_p)


if __name__ == "__main__":
    run(main)
