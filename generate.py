"""Let a LLaMA continue a text."""

from pathlib import Path

from lit_llama.checkpoint import default_precision, load_model, storage_dtype
from lit_llama.cli import run
from lit_llama.generation import default_device, read_prompts, respond
from lit_llama.tokenizer import find_tokenizer


def main(
    prompt: str = "Hello, my name is",
    input: str = "",
    prompt_file: Path | None = None,
    prompt_style: str = "plain",
    checkpoint_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    num_samples: int = 1,
    max_new_tokens: int = 50,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    seed: int = 1234,
    precision: str | None = None,
) -> None:
    """Print samples as they come.

    Args:
        prompt: The text to continue.
        input: What an instruction works on, where the style has a place for it.
        prompt_file: Several prompts, one a line, instead.
        prompt_style: plain for a text to continue, alpaca for an instruction.
        checkpoint_path: The model.
        tokenizer_path: The tokenizer, if it does not lie beside the checkpoint.
        num_samples: How often each prompt is continued.
        max_new_tokens: The longest continuation, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw from this many of the likeliest tokens only.
        top_p: Draw from the likeliest tokens that make up this probability only.
        seed: Of the sampling; each further sample counts it up.
        precision: 32-true, bf16-true or 16-true. By default bf16-true on a GPU that has bfloat16, else 32-true.
    """
    dtype = storage_dtype(precision or default_precision())
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    model = load_model(checkpoint_path, dtype, default_device())
    for i in range(num_samples):
        respond(model, tokenizer, prompts, prompt_style, input, seed + i, max_new_tokens, temperature, top_k, top_p)


if __name__ == "__main__":
    run(main)
