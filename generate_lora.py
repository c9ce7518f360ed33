"""Let a LLaMA that was finetuned with finetune_lora.py follow an instruction."""

import sys
from pathlib import Path

from lit_llama.cli import run
from lit_llama.device import Precision, default_precision, storage_dtype
from lit_llama.errors import UserError
from lit_llama.finetuned import base_is_nf4, load_for_use, read_finetuned
from lit_llama.generation import Question, Sampling, compile_steps, read_prompts, respond
from lit_llama.many_lora import ManyLoRA
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import Message, find_template
from lit_llama.quantization import Quantization
from lit_llama.storage.files import read_text
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    prompt_style: str | None = None,
    lora_path: tuple[Path, ...] = (Path("out/lora/alpaca"),),
    lora_of: str | None = None,
    batch_size: PositiveInt | None = None,
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
    """Print the response as it comes. Rank, alpha and targets are those of the LoRA file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: A file of instructions, one per line, to use instead.
        prompt_style: The chat template: own (that of the LoRA file: the default), alpaca, chatml or another style of
            lit_llama/prompt.py, or a file that holds one.
        lora_path: The file that finetune_lora.py wrote, or the run's folder, whose best file is used; or several, for
            batches in which each question has its own file, on one base.
        lora_of: Which of several files answers: each (all of them, every question: the default for --prompt), round
            (question by question the next one: the default for --prompt_file), or a file with a line for each question:
            one of the paths of --lora_path, its number from 1, or - for the base alone.
        batch_size: Questions that are answered at once, which takes more memory and is faster. Answers are then printed
            when all of a batch are there. Default: 1, or 16 with several LoRA files.
        lora_alpha: Only for a file of the archived Lit-LLaMA, which did not store it.
        pretrained_path: The checkpoint of the base model. Default: checkpoints/lit-llama/7B, or else the model written
            last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        merge: Fold the update into the weights first, which is faster. Several files stay apart. Default: true, unless
            the file was trained on a 4-bit base, which would no longer be in 4 bits.
        force: Use the file even if it was trained on a different base model of the same shape.
        max_new_tokens: The longest response, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw only from this many of the likeliest tokens; 0 for all.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Random seed of the sampling.
        precision: By default the weights are bfloat16 on a GPU that has it, else float32.
        quantize: int8: weights in 8 bits, for less memory, faster tokens on a CPU and slightly different numbers; nf4:
            those of the blocks in 4 bits, which follows by itself if LoRA or an adapter was trained so.
        compile: Compile the computation of a token first, which takes up to a few minutes and pays off for long or
            many answers.
    """
    pretrained_path = find_model(pretrained_path)
    several = len(lora_path) > 1 or lora_of is not None
    if merge and several:
        raise UserError("a merged LoRA file leaves no room for others; leave out --merge")
    if quantize == "int8" and merge is False and not several:
        raise UserError("--quantize int8 needs a merged LoRA file; leave out --merge false")
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = read_prompts(prompt, prompt_file)
    asked = ask(prompts, lora_path, lora_of or ("round" if prompt_file else "each"))
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    files = [read_finetuned(path, "lora", lora_alpha, pretrained_path, force) for path in lora_path]
    is_nf4 = base_is_nf4(*files)
    many, batch_size = None, batch_size or (16 if several else 1)
    if several:
        model = load_for_use(pretrained_path, dtype, (), quantize or ("nf4" if is_nf4 else None))
        many = ManyLoRA(model, files, min(batch_size, len(asked)))
        print(*(f"{i}: {file.path}" for i, file in enumerate(files, 1)), sep="\n", file=sys.stderr)
    else:
        merge = quantize != "nf4" and not is_nf4 if merge is None else merge
        model = load_for_use(pretrained_path, dtype, files, quantize, merge)
    if compile:
        compile_steps(model)
    templates = [find_template(prompt_style, file.prompt_style) for file in files]
    if any(i == -1 for i, _ in asked):  # the last one is the base's
        templates.append(find_template(prompt_style, own_template(pretrained_path), "plain"))
    questions = [Question(Message("user", text, input), templates[i], i if several else -1) for i, text in asked]
    respond(model, tokenizer, questions, sampling, batch_size, many)


def ask(prompts: list[str], paths: tuple[Path, ...], lora_of: str) -> list[tuple[int, str]]:
    """Each question with the number of the LoRA file that answers it, from 0; -1 is the base."""
    if lora_of == "each":
        return [(i, prompt) for i in range(len(paths)) for prompt in prompts]
    if lora_of == "round":
        return [(i % len(paths), prompt) for i, prompt in enumerate(prompts)]
    lines = [line.strip() for line in read_text(Path(lora_of).expanduser()).splitlines() if line.strip()]
    if len(lines) != len(prompts):
        raise UserError(f"{lora_of} has {len(lines)} lines, expected one for each of the {len(prompts)} questions")
    numbers = {"-": -1} | {str(i): i - 1 for i in range(1, len(paths) + 1)}
    numbers |= {str(path): i for i, path in enumerate(paths)}
    if unknown := [line for line in lines if line not in numbers]:
        raise UserError(f"{lora_of}: {unknown[0]} is not a path of --lora_path, 1 to {len(paths)}, or - for the base")
    return [(numbers[line], prompt) for line, prompt in zip(lines, prompts, strict=True)]


if __name__ == "__main__":
    run(main)
