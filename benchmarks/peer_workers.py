"""Both ends of the pipe of peers.py: one process holds one model in one runtime, so that its memory and its threads are its own.

    python benchmarks/peer_workers.py KIND MODEL THREADS PROMPT NEW   # KIND: see KINDS; commands come on stdin
    python benchmarks/peer_workers.py gguf CHECKPOINT FOLDER          # fp16, Q4_0 and Q8_0

Imports stay inside functions: the llama.cpp side runs in an interpreter that has neither onnxruntime nor bittailor, and whatever is
imported without need would count as the runtime's memory.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

WINDOW_SECONDS = 0.2
"""An encoder runs again and again for this long, and the median of it is one trial: one run of 10 ms is too short to time."""


@dataclass(frozen=True)
class Runner:
    """One row: a model file and the worker that runs it."""

    name: str
    kind: str
    model: Path
    bits: int
    ours: bool = False
    python: str = sys.executable

    def files(self) -> list[Path]:
        """The model and its external data."""
        return list(self.model.parent.glob(f"{self.model.name}*"))


class Worker:
    """A runner's process. `ask` raises RuntimeError, naming it, if it is gone.

    The model's files are dropped from the page cache and read again first: a page fault in a mapped file also maps what lies cached
    around it, so the peak of one and the same package was seen to move by a quarter with what the cache had of it, and in what pieces.
    """

    def __init__(self, runner: Runner, *shape: int) -> None:
        self._name = runner.name
        for path in runner.files():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                while file.read(1 << 20):
                    pass
        command = [runner.python, __file__, runner.kind, str(runner.model), *map(str, shape)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.hello = self._read()

    def _read(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected an answer from {self._name}, its process ended with code {self._process.wait()}")
        return json.loads(line)

    def ask(self, command: str, ids: list[int]) -> dict:
        self._process.stdin.write(json.dumps([command, ids]) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()


def busy_seconds() -> float:
    """CPU seconds that anyone used since boot, steal included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    """Peak resident set of this process so far, MB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


def errors_only(cpp):
    """Keep llama.cpp's log to its errors. The caller holds on to what comes back: C has no reference to it."""
    error = 4
    callback = cpp.llama_log_callback(lambda level, text, data: level == error and sys.stderr.write(text.decode()) and None)
    cpp.llama_log_set(callback, None)
    return callback


class _Decoder:
    """Times what a subclass loads: `prefill(ids)` and `step(token)`, both returning the last position's logits [V]."""

    def run(self, ids: list[int]) -> dict:
        start = time.perf_counter()
        token = int(self.prefill(ids).argmax())
        middle = time.perf_counter()
        for _ in range(self.new):
            token = int(self.step(token).argmax())
        end = time.perf_counter()
        return {"prefill tok/s": len(ids) / (middle - start), "decode tok/s": self.new / (end - middle)}

    def output(self, ids: list[int]) -> dict:
        return {"vector": self.prefill(ids).tolist()}


class OnnxDecoder(_Decoder):
    """Any package of ours or of onnxruntime-genai, through the same loop on plain onnxruntime."""

    def __init__(self, model: Path, threads: int, prompt: int, new: int) -> None:
        import numpy
        import onnxruntime

        from toolchain.decoding import Decoder

        self.bare_mb, self.version, self.new = peak_mb(), onnxruntime.__version__, new
        decoder = Decoder(model.parent, threads, prompt + new)
        self.prefill, self.step = lambda ids: decoder.prefill(numpy.array(ids)), decoder.step


class LlamaDecoder(_Decoder):
    """llama.cpp through its C interface: the high-level class adds copies and Python that are not the kernels'.

    Its best case: weights repacked as it likes, buffers for just this prompt, logits of the last token only, and no copy of them: the
    array returned is llama.cpp's own and lives until the next call. mapped=False reads the file instead of mapping it (the default):
    where weights are repacked, the map is a second copy of them in the peak.
    """

    def __init__(self, model: Path, threads: int, prompt: int, new: int, mapped: bool = True) -> None:
        import llama_cpp as cpp
        import numpy

        self.bare_mb, self.new, self._cpp, self._numpy = peak_mb(), new, cpp, numpy
        self._log = errors_only(cpp)
        cpp.llama_backend_init()
        self.version = f"{cpp.__version__} ({' '.join(re.findall(r'([A-Z0-9_]+) = 1', cpp.llama_print_system_info().decode()))})"
        loading = cpp.llama_model_default_params()
        if not mapped:
            loading.load_mode = loading.use_mmap = 0  # one of the two exists: the name changed between releases
        self._model = cpp.llama_model_load_from_file(str(model).encode(), loading)
        settings = cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = prompt + new, prompt, prompt
        settings.n_threads = settings.n_threads_batch = threads
        self._context = self._model and cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise SystemExit(f"expected llama.cpp to load {model}, it did not")
        self._vocabulary = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(self._model))

    def prefill(self, ids):
        self._cpp.llama_memory_clear(self._cpp.llama_get_memory(self._context), False)
        return self._decode(ids)

    def step(self, token):
        return self._decode([token])

    def _decode(self, ids):
        cpp = self._cpp
        tokens = (cpp.llama_token * len(ids))(*ids)
        if code := cpp.llama_decode(self._context, cpp.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit(f"expected llama_decode to return 0, got {code}")
        return self._numpy.ctypeslib.as_array(cpp.llama_get_logits_ith(self._context, -1), (self._vocabulary,))


class OnnxEncoder:
    """One encoder graph on plain onnxruntime with its default options, ours as its manifest says. Every token counts: no padding, a mask
    of ones."""

    def __init__(self, model: Path, threads: int, prompt: int, new: int) -> None:
        import numpy
        import onnxruntime

        self.bare_mb, self.version, self._numpy = peak_mb(), onnxruntime.__version__, numpy
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        if (model.parent / "manifest.yaml").exists():
            options.enable_mem_pattern = False  # as a package's manifest says
        self._session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])

    def _feeds(self, ids):
        array = self._numpy.array([ids], self._numpy.int64)
        known = {"input_ids": array, "attention_mask": array * 0 + 1, "token_type_ids": array * 0}
        return {item.name: known[item.name] for item in self._session.get_inputs()}

    def run(self, ids: list[int]) -> dict:
        feeds, times, start = self._feeds(ids), [], time.perf_counter()
        while time.perf_counter() - start < WINDOW_SECONDS:
            before = time.perf_counter()
            self._session.run(None, feeds)
            times.append(time.perf_counter() - before)
        return {"latency ms": median(times) * 1e3}

    def output(self, ids: list[int]) -> dict:
        return {"vector": self._session.run(None, self._feeds(ids))[0][0].mean(0).tolist()}


KINDS = {
    "onnx-decoder": OnnxDecoder,
    "onnx-encoder": OnnxEncoder,
    "llama-decoder": LlamaDecoder,
    "llama-decoder-unmapped": partial(LlamaDecoder, mapped=False),
}


def serve(kind: str, model: Path, threads: int, prompt: int, new: int) -> None:
    """Answer JSON lines `[command, ids]` until stdin ends; each answer also tells the CPU seconds it took and the peak so far."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a runtime prints must not stand between the answers
    runner = KINDS[kind](model, threads, prompt, new)
    print(json.dumps({"version": runner.version, "bare_mb": runner.bare_mb}), file=answers, flush=True)
    for line in sys.stdin:
        command, ids = json.loads(line)
        before = time.process_time()
        answer = getattr(runner, command)(ids)
        print(json.dumps(answer | {"cpu_s": time.process_time() - before, "peak_mb": peak_mb()}), file=answers, flush=True)


def write_gguf(source: Path, folder: Path) -> None:
    """A Llama checkpoint in fp16 safetensors as folder/f16.gguf, then q4_0.gguf and q8_0.gguf by llama.cpp's own quantiser.

    `pure`: every matrix in the named type. By default llama.cpp keeps a Q4_0 model's head in Q6_K; the packages it is compared with have
    the head at 4 bits, so that would not be equal bits, and it would cost llama.cpp speed: pure is fairer and the stronger peer.
    """
    import gguf
    import llama_cpp as cpp
    import numpy

    config = json.loads((source / "config.json").read_text())
    heads, kv_heads, layers = config["num_attention_heads"], config["num_key_value_heads"], config["num_hidden_layers"]
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / "f16.gguf"
    writer = gguf.GGUFWriter(made, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(layers)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")  # token ids in, logits out: nothing here needs the text of a token
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    raw = numpy.memmap(source / "model.safetensors", numpy.uint8, "r")
    start = 8 + int(raw[:8].view("<u8")[0])
    for name, entry in sorted(json.loads(bytes(raw[8:start])).items()):
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        tensor = raw[start + first : start + last].view({"F16": "<f2", "F32": "<f4"}[entry["dtype"]]).reshape(entry["shape"])
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            # Hugging Face turns the first half of a head with the second; llama.cpp turns neighbours: interleave the halves.
            pairs = tensor.reshape(kv_heads if "k_proj" in name else heads, 2, -1, tensor.shape[1])
            tensor = numpy.ascontiguousarray(numpy.moveaxis(pairs, 1, 2)).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.astype("<f4") if tensor.ndim == 1 else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    _log = errors_only(cpp)
    for name, kind in (("q4_0", cpp.LLAMA_FTYPE_MOSTLY_Q4_0), ("q8_0", cpp.LLAMA_FTYPE_MOSTLY_Q8_0)):
        settings = cpp.llama_model_quantize_default_params()
        settings.ftype, settings.pure = kind, True
        if cpp.llama_model_quantize(str(made).encode(), str(folder / f"{name}.gguf").encode(), ctypes.byref(settings)):
            raise SystemExit(f"expected llama.cpp to quantise {made} to {name}, it did not")


if __name__ == "__main__":
    if sys.argv[1] == "gguf":
        write_gguf(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        serve(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:6]))
