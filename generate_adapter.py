"""Let a LLaMA that was finetuned with finetune_adapter.py follow an instruction."""

from pathlib import Path

from lit_llama.adapter import cache_prefix
from lit_llama.cli import run
from lit_llama.device import Precision, default_device, default_precision, storage_dtype
from lit_llama.finetuned import base_is_nf4, read_finetuned
from lit_llama.generation import Sampling, compile_steps, read_prompts, respond
from lit_llama.model_folder import find_model, finish_loading, load_for_merging
from lit_llama.quantization import Quantization
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    adapter_path: Path = Path("out/adapter/alpaca"),
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    force: bool = False,
    max_new_tokens: PositiveInt = 100,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt | None = 200,
    top_p: NonNegativeFloat | None = None,
    seed: int = 1234,
    precision: Precision | None = None,
    quantize: Quantization | None = None,
    compile: bool = False,
) -> None:
    """Print the response as it comes. Prompt length, start layer and prompt style are those of the adapter file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: A file of instructions, one per line, to use instead.
        adapter_path: The file that finetune_adapter.py wrote, or the run's folder, whose best file is used.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        force: Use the file even if it was trained on a different base model of the same shape.
        max_new_tokens: The longest response, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw only from this many of the likeliest tokens; 0 for all.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Random seed of the sampling.
        precision: By default the weights are bfloat16 on a GPU that has it, else float32.
        quantize: int8: weights in 8 bits, for less memory, faster tokens on a CPU and slightly different numbers.
        compile: Compile the computation of a token first, which takes up to a few minutes and pays off for long or
            many answers.
    """
    pretrained_path = find_model(pretrained_path)
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    device = default_device()
    adapter = read_finetuned(adapter_path, "adapter", None, pretrained_path, force)
    model = load_for_merging(pretrained_path, quantize, dtype, device, base_is_nf4(adapter))
    adapter.add_to(model)
    finish_loading(model, quantize, dtype, device)
    cache_prefix(model)
    if compile:
        compile_steps(model)
    respond(model, tokenizer, prompts, adapter.prompt_style, input, sampling)


if __name__ == "__main__":
    run(main)
