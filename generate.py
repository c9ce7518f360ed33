"""Let a LLaMA continue a text."""

from dataclasses import replace
from pathlib import Path

from lit_llama.cli import run
from lit_llama.device import Precision, default_precision, storage_dtype
from lit_llama.finetuned import load_for_use
from lit_llama.generation import Question, Sampling, compile_steps, read_prompts, respond
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import Message, find_template
from lit_llama.quantization import Quantization
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt


def main(
    prompt: str = "Hello, my name is",
    input: str = "",
    prompt_file: Path | None = None,
    batch_size: PositiveInt = 1,
    prompt_style: str | None = None,
    checkpoint_path: Path | None = None,
    tokenizer_path: Path | None = None,
    num_samples: PositiveInt = 1,
    max_new_tokens: PositiveInt = 50,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt | None = 200,
    top_p: NonNegativeFloat | None = None,
    seed: int = 1234,
    precision: Precision | None = None,
    quantize: Quantization | None = None,
    compile: bool = False,
) -> None:
    """Print samples as they come.

    Args:
        prompt: The text to continue.
        input: What an instruction works on, if anything.
        prompt_file: A file of prompts, one per line, to use instead.
        batch_size: Prompts that are continued at once, which takes more memory and is faster. The texts of a batch
            are then printed at its end.
        prompt_style: The chat template: own (the model's), plain (the text alone, to be continued), alpaca, chatml or
            another style of lit_llama/prompt.py, or a file that holds one. By default own, or plain for a model that
            has none.
        checkpoint_path: The model. Default: checkpoints/lit-llama/7B, or else the model written last.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        num_samples: Continuations per prompt.
        max_new_tokens: The longest continuation, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw only from this many of the likeliest tokens; 0 for all.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Random seed of the sampling; sample i uses seed + i.
        precision: By default the weights are bfloat16 on a GPU that has it, else float32.
        quantize: int8: weights in 8 bits, for less memory, faster tokens on a CPU and slightly different numbers; nf4:
            those of the blocks in 4 bits, which follows by itself if LoRA or an adapter was trained so.
        compile: Compile the computation of a token first, which takes up to a few minutes and pays off for long or
            many answers.
    """
    checkpoint_path = find_model(checkpoint_path)
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    template = find_template(prompt_style, own_template(checkpoint_path), "plain")
    model = load_for_use(checkpoint_path, dtype, quantize=quantize)
    if compile:
        compile_steps(model)
    questions = [Question(Message("user", prompt, input), template) for prompt in prompts]
    for i in range(num_samples):
        respond(model, tokenizer, questions, replace(sampling, seed=seed + i), batch_size)


if __name__ == "__main__":
    run(main)
