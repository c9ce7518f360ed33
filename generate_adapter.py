"""Let a LLaMA that was finetuned with finetune_adapter.py follow an instruction."""

from pathlib import Path

from lit_llama.cli import run
from lit_llama.device import Precision, default_precision, storage_dtype
from lit_llama.finetuned import load_for_use, read_finetuned
from lit_llama.generation import Question, Sampling, compile_steps, read_prompts, respond
from lit_llama.model_folder import find_model
from lit_llama.prompt import Message, find_template
from lit_llama.quantization import Quantization
from lit_llama.tokenizer import find_tokenizer

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt


def main(
    prompt: str = "Please explain how weight decay works",
    input: str = "",
    prompt_file: Path | None = None,
    batch_size: PositiveInt = 1,
    prompt_style: str | None = None,
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
    """Print the response as it comes. Prompt length and start layer are those of the adapter file.

    Args:
        prompt: The instruction.
        input: What the instruction works on, if anything.
        prompt_file: A file of instructions, one per line, to use instead.
        batch_size: Questions that are answered at once, which takes more memory and is faster. Answers are then printed
            when all of a batch are there.
        prompt_style: The chat template: own (that of the adapter file: the default), alpaca, chatml or another style of
            lit_llama/prompt.py, or a file that holds one.
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
        quantize: int8: weights in 8 bits, for less memory, faster tokens on a CPU and slightly different numbers; nf4:
            those of the blocks in 4 bits, which follows by itself if LoRA or an adapter was trained so.
        compile: Compile the computation of a token first, which takes up to a few minutes and pays off for long or
            many answers.
    """
    pretrained_path = find_model(pretrained_path)
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = read_prompts(prompt, prompt_file)
    tokenizer = find_tokenizer(pretrained_path, tokenizer_path)
    adapter = read_finetuned(adapter_path, "adapter", None, pretrained_path, force)
    model = load_for_use(pretrained_path, dtype, [adapter], quantize)
    if compile:
        compile_steps(model)
    template = find_template(prompt_style, adapter.prompt_style)
    questions = [Question(Message("user", prompt, input), template) for prompt in prompts]
    respond(model, tokenizer, questions, sampling, batch_size)


if __name__ == "__main__":
    run(main)
