"""Talk with a base, LoRA, adapter or fully finetuned model in the terminal."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from lit_llama.adapter import cache_prefix
from lit_llama.cli import run
from lit_llama.device import Precision, default_precision, storage_dtype
from lit_llama.errors import UserError
from lit_llama.finetuned import FinetunedFile, base_is_nf4, load_for_use, read_finetuned
from lit_llama.generation import Sampling, compile_steps
from lit_llama.lora import remove_lora
from lit_llama.model_folder import find_model, own_template
from lit_llama.prompt import STYLES, find_template, name_of
from lit_llama.quantization import Quantization
from lit_llama.tokenizer import find_tokenizer

import torch
from conversation import Conversation, takes_turns
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

HELP = """\
/reset         start a new conversation, with the same system message
/system TEXT   tell the model how to answer; without TEXT, take that back
/lora PATH     go on with another LoRA file; without PATH, with none
/help          show this
/quit          leave, as Ctrl-D does
Ctrl-C ends an answer. A line that starts with a space is never a command."""


def main(
    checkpoint_path: Path | None = None,
    lora_path: Path | None = None,
    adapter_path: Path | None = None,
    tokenizer_path: Path | None = None,
    prompt_style: str | None = None,
    system: str = "",
    lora_alpha: float | None = None,
    force: bool = False,
    max_new_tokens: PositiveInt = 500,
    temperature: NonNegativeFloat = 0.8,
    top_k: NonNegativeInt | None = 200,
    top_p: NonNegativeFloat | None = None,
    seed: int = 1234,
    precision: Precision | None = None,
    quantize: Quantization | None = None,
    compile: bool = False,
) -> None:
    """Answer the lines of the terminal or of a pipe, as one conversation. /help lists the commands.

    Args:
        checkpoint_path: The base model, or what finetune_full.py or merge_lora.py wrote. Default:
            checkpoints/lit-llama/7B, or else the model written last.
        lora_path: The file that finetune_lora.py wrote, or the run's folder. It can be swapped in the conversation.
        adapter_path: The file that finetune_adapter.py wrote, or the run's folder.
        tokenizer_path: The tokenizer, if it is not next to the checkpoint.
        prompt_style: The chat template: own (that of the LoRA or adapter file, or else the model's: the default),
            alpaca, chatml or another style of lit_llama/prompt.py, or a file that holds one.
        system: A system message, if the template takes one.
        lora_alpha: Only for LoRA files of the archived Lit-LLaMA, which did not store it.
        force: Use a file even if it was trained on a different base model of the same shape.
        max_new_tokens: The longest answer, in tokens.
        temperature: Below 1 for likelier text, above for more varied; 0 always takes the likeliest token.
        top_k: Draw only from this many of the likeliest tokens; 0 for all.
        top_p: Draw only from the likeliest tokens that together have this probability.
        seed: Random seed of the sampling.
        precision: By default the weights are bfloat16 on a GPU that has it, else float32.
        quantize: int8: weights in 8 bits, for less memory, faster tokens on a CPU and slightly different numbers; nf4:
            those of the blocks in 4 bits, which follows by itself if LoRA or an adapter was trained so.
        compile: Compile the computation of a token first, which takes up to a few minutes. With this or int8, LoRA is
            merged, and cannot be swapped.
    """
    checkpoint_path = find_model(checkpoint_path)
    dtype = storage_dtype(precision or default_precision())
    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    tokenizer = find_tokenizer(checkpoint_path, tokenizer_path)
    lora = read_finetuned(lora_path, "lora", lora_alpha, checkpoint_path, force) if lora_path else None
    adapter = read_finetuned(adapter_path, "adapter", None, checkpoint_path, force) if adapter_path else None
    nf4 = base_is_nf4(lora, adapter)
    is_fixed = compile or quantize == "int8"
    model = load_for_use(checkpoint_path, dtype, [lora, adapter], quantize, merge=is_fixed)
    tokenizer.check_fits(model.config.vocab_size)
    if compile:
        compile_steps(model)

    def read(path: Path | None) -> FinetunedFile | None:
        if is_fixed:
            raise UserError("with --compile or --quantize int8, LoRA is merged; start chat.py again, with --lora_path")
        file = read_finetuned(path, "lora", lora_alpha, checkpoint_path, force) if path else None
        if file and not quantize and base_is_nf4(file) != nf4:
            kind = "that is not in 4 bits" if nf4 else "in 4 bits"
            raise UserError(f"{path} was trained on a base {kind}; start chat.py again with --lora_path {path}")
        return file

    own = adapter.prompt_style if adapter else own_template(checkpoint_path)
    chat = Chat(Conversation(model, tokenizer, STYLES["plain"]), sampling, read, own, prompt_style)
    chat.set_lora(lora)
    if system:
        chat.conversation.set_system(system)
    torch.manual_seed(seed)
    print(f"Prompt style {name_of(chat.conversation.template)}. /help lists the commands.", file=sys.stderr)
    for line in typed_lines():
        if line.strip() == "/quit":
            break
        try:
            chat.take(line)
        except BrokenPipeError:  # nobody reads the answers
            raise
        except (UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print(flush=True)  # after what has come of the answer


class Chat:
    """A conversation, and the commands that change it.

    Args:
        read: reads a LoRA file for the base model, if its layers can be put in place of those that are on it.
        own: the template of the model without LoRA, if it is known.
        style: the one that --prompt_style names, to be used with any LoRA file.
    """

    def __init__(
        self,
        conversation: Conversation,
        sampling: Sampling,
        read: Callable[[Path | None], FinetunedFile | None],
        own: str | None,
        style: str | None,
    ) -> None:
        self.conversation, self.sampling, self.read = conversation, sampling, read
        self.own, self.style = own, style
        self.lora: FinetunedFile | None = None
        self.has_told = False  # that each question is a conversation of its own

    def take(self, line: str) -> None:
        """Answer a line, or do what it commands."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            self.answer(line.strip())
        elif command == "/reset":
            self.conversation.reset()
        elif command == "/system":
            self.conversation.set_system(rest)
        elif command == "/lora":
            self.swap(self.read(Path(os.path.expanduser(rest)) if rest else None))
        elif command == "/help":
            print(HELP, file=sys.stderr)
        else:
            raise UserError(f"there is no command {command}; /help lists them")

    def answer(self, question: str) -> None:
        """Print the answer as it comes, and why it ends if that is not its own end."""
        if not question:
            return
        if not sys.stdin.isatty():
            print(f"> {question}", file=sys.stderr)
        template = self.conversation.template
        if not (self.has_told or takes_turns(template, self.conversation.tokenizer)) and self.conversation.messages:
            what = f"The prompt style {name_of(template)} takes one question"
            print(f"({what}, so each starts a new conversation.)", file=sys.stderr)
            self.has_told = True
        for piece in self.conversation.ask(question, self.sampling):
            print(piece, end="", flush=True)
        print(flush=True)
        if self.conversation.is_full:
            print("(The context is full; /reset starts a new conversation.)", file=sys.stderr)
        elif not self.conversation.ended:
            limit = self.sampling.max_new_tokens
            print(f"(Cut after {limit} tokens, the most that --max_new_tokens allows.)", file=sys.stderr)

    def swap(self, lora: FinetunedFile | None) -> None:
        """Go on with another LoRA file, or with the one there is if the other cannot be used."""
        before = self.lora
        try:
            self.use(lora)
        except (UserError, KeyboardInterrupt):
            self.use(before)
            raise
        print(
            f"{lora.path if lora else 'No LoRA file'}, prompt style {name_of(self.conversation.template)}",
            file=sys.stderr,
        )

    def use(self, lora: FinetunedFile | None) -> None:
        """Put the LoRA layers of a file, or none, onto the base model, in place of others."""
        self.conversation.forget()
        model = self.conversation.model
        dtype = model.lm_head.weight.dtype
        remove_lora(model)
        if lora:
            lora.add_to(model)
        cache_prefix(model.to(dtype).eval())
        self.set_lora(lora)

    def set_lora(self, lora: FinetunedFile | None) -> None:
        """Answer in the template of a LoRA file whose layers are on the model."""
        self.lora = lora
        self.conversation.template = find_template(self.style, lora.prompt_style if lora else self.own)


def typed_lines() -> Iterator[str]:
    """The lines of the terminal, edited and recalled by arrow keys where Python can, or those of a pipe."""
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    with suppress(ImportError):
        import readline  # noqa: F401 - input() uses it
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            yield input("> " if in_terminal else "")
        except EOFError:
            if in_terminal:
                print()
            return
        except KeyboardInterrupt:
            print("\n/quit or Ctrl-D ends the conversation", file=sys.stderr)


if __name__ == "__main__":
    run(main)
