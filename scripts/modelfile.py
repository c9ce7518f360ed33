"""Ollama's Modelfile: a GGUF with the template of its training, in the language of Go's templates if it is one of ours.

Ollama puts the bos before a conversation itself. Its templates cannot trim white space.
"""

from lit_llama.progress import say
from lit_llama.prompt import SMOLLM2_SYSTEM, name_of, stop_ids
from lit_llama.tokenizer import Tokenizer

CHATML = "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{{ .Prompt }}\n\n### Response:"
)
TEMPLATES = {  # by the names of STYLES; BOS and EOS are put in
    "plain": "{{ .Prompt }}",
    "alpaca": f"{ALPACA}\n",
    "alpaca-stanford": ALPACA,
    "chatml": CHATML,
    "smollm2": CHATML,
    "llama2": (
        '{{ $system := "" }}{{ range .Messages }}'
        '{{ if eq .Role "system" }}{{ $system = printf "<<SYS>>\\n%s\\n<</SYS>>\\n\\n" .Content }}'
        '{{ else if eq .Role "user" }}[INST] {{ $system }}{{ .Content }} [/INST]{{ $system = "" }}'
        "{{ else }} {{ .Content }} EOSBOS{{ end }}{{ end }}"
    ),
    "llama3": (
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "zephyr": "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}EOS\n{{ end }}<|assistant|>\n",
}


def modelfile(model: str, adapter: str | None, template: str | None, tokenizer: Tokenizer) -> str:
    """The Modelfile of a model, a GGUF or a name that Ollama knows, perhaps with the GGUF of a LoRA."""
    lines = [f"FROM {model}"] + [f"ADAPTER {adapter}"] * bool(adapter)
    if template:
        name, bos, eos = name_of(template), tokenizer.names.get("bos_token", ""), tokenizer.names["eos_token"]
        if name in TEMPLATES:
            text = TEMPLATES[name].replace("BOS", bos).replace("EOS", eos)
            lines.append(f'TEMPLATE """{text}"""')
        else:
            say("The Modelfile has no TEMPLATE: Ollama looks in the model's GGUF for the chat template")
        if name == "smollm2":  # what the model says of itself, unless there is another system message
            lines.append(f'SYSTEM """{SMOLLM2_SYSTEM}"""')
        lines += [f'PARAMETER stop "{tokenizer.token(i)}"' for i in sorted(stop_ids(template, tokenizer))]
    return "\n".join(lines) + "\n"
