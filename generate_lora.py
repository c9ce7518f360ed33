"""Let a LLaMA that was finetuned with finetune_lora.py follow an instruction."""

from pathlib import Path

from lit_llama.checkpoint import default_precision, load_model, storage_dtype
from lit_llama.cli import run
from lit_llama.generation import default_device, read_prompts, respond
from lit_llama.lora import load_lora, merge_lora
from lit_llama.tokenizer import find_tokenizer


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    lora_path: Path = Path("out/lora/alpaca/lit-llama-lora-finetuned.pth"),
    pretrained_path: Path = Path("checkpoints/lit-llama/7B/lit-llama.pth"),
    tokenizer_path: Path | None = None,
    merge: bool = True,
    max_new_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int | None = 200,
    top_p: float | None = None,
    seed: int = 1234,
    precision: str | None = None,
) -> None:
    """Print the response as it comes. Rank, alpha, targets and prompt style are those of the LoRA file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: Several instructions, one a line, instead.
        lora_path: The file that finetune_lora.py wrote.
        pretrained_path: The checkpoint of the base model.
        tokenizer_path: The tokenizer, if it does not lie beside the checkpoint.
        merge: Fold the update into the weights first, which is faster; false keeps it apart.
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
    prompt_style = load_lora(model, lora_path)
    if merge:
        merge_lora(model)
    model.to(dtype)
    respond(
        model,
        tokenizer,
        prompts,
        prompt_style,
        input,
        seed,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )


if __name__ == "__main__":
    run(main)
