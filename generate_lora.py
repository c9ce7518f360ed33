"""Let a LLaMA that was finetuned with finetune_lora.py follow an instruction."""

import sys
import time
from pathlib import Path

from lit_llama.cli import run
from lit_llama.device import Precision, default_device, default_precision, storage_dtype
from lit_llama.errors import UserError
from lit_llama.finetuned import base_is_nf4, read_finetuned
from lit_llama.generation import Sampling, compile_steps, read_prompts, respond
from lit_llama.lora import merge_lora, remove_lora
from lit_llama.model_folder import find_model, finish_loading, load_for_merging
from lit_llama.quantization import Quantization
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    lora_path: tuple[Path, ...] = (Path("out/lora/alpaca"),),
    lora_alpha: float | None = None,
    pretrained_path: Path | None = None,
    tokenizer_path: Path | None = None,
    merge: bool | None = None,
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
    """Print the response as it comes. Rank, alpha, targets and prompt style are those of the LoRA file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: A file of instructions, one per line, to use instead.
        lora_path: The file that finetune_lora.py wrote, or the run's folder, whose best file is used. Of several,
            each answers in turn on the same base.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        merge: Fold the update into the weights first, which is faster. Default: true for one file, false for several,
            and for one that was trained on a 4-bit base, which would no longer be in 4 bits.
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
    if merge and len(lora_path) > 1:
        raise UserError("a merged LoRA file cannot make room for the next; leave out --merge")
    if quantize and (merge is False or len(lora_path) > 1):
        raise UserError("--quantize needs a merged LoRA file; give one, and leave out --merge false")
    if compile and len(lora_path) > 1:
        raise UserError("--compile takes one LoRA file, since it would compile the model again for the next")
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    device = default_device()
    files = [read_finetuned(path, "lora", lora_alpha, pretrained_path, force) for path in lora_path]
    nf4 = base_is_nf4(*files)
    model = load_for_merging(pretrained_path, quantize, dtype, device, nf4)
    for file in files:
        start = time.perf_counter()
        remove_lora(model)
        file.add_to(model)
        if merge or quantize or (merge is None and len(files) == 1 and not nf4):
            merge_lora(model)
        finish_loading(model, quantize, dtype, device)
        if compile:
            compile_steps(model)
        if len(files) > 1:
            print(f"# {file.path} (loaded in {1000 * (time.perf_counter() - start):.0f} ms)", file=sys.stderr)
        respond(model, tokenizer, prompts, file.prompt_style, input, sampling)


if __name__ == "__main__":
    run(main)
