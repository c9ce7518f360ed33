from lit_llama import start as start
