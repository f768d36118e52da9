import json

import numpy as np
import onnx
import onnxruntime
import pytest
from tiny_graphs import attention

from toolchain.decoding import Decoder
from toolchain.errors import DamagedFileError, InputError
from toolchain.package.generate import generate
from toolchain.session import cache_slots, token_feeds
from toolchain.text import load_tokenizer


def _logits(directory, ids):
    """Logits [V] after `ids`, from an empty cache and without any sharing: the reference."""
    session = onnxruntime.InferenceSession(str(directory / "model.onnx"))
    empty = {slot.past: slot.zeros(0) for slot in cache_slots(session)}
    return session.run(["logits"], {**token_feeds(session, np.asarray(ids, np.int64)[None]), **empty})[0][0, -1]


def _greedy(directory, ids, count):
    ids = list(ids)
    for _ in range(count):
        ids.append(int(_logits(directory, ids).argmax()))
    return ids[-count:]


def test_steps_on_the_shared_cache_equal_one_run_over_the_whole_sequence(tmp_path):
    directory = attention(tmp_path)
    ids = np.random.default_rng(3).integers(0, 4096, 20)
    decoder = Decoder(directory, threads=1, capacity=24)
    np.testing.assert_allclose(decoder.prefill(ids[:5]), _logits(directory, ids[:5]), rtol=1e-4, atol=1e-4)
    for count in range(5, 20):
        np.testing.assert_allclose(decoder.step(ids[count]), _logits(directory, ids[: count + 1]), rtol=1e-4, atol=1e-4)
    assert decoder.used == 20


def test_a_new_sequence_does_not_see_the_one_before(tmp_path):
    directory = attention(tmp_path)
    decoder = Decoder(directory, capacity=16)
    decoder.prefill(np.arange(100, 116))
    np.testing.assert_allclose(decoder.prefill(np.array([7, 8])), _logits(directory, [7, 8]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(decoder.step(9), _logits(directory, [7, 8, 9]), rtol=1e-4, atol=1e-4)
    decoder.reset()
    np.testing.assert_allclose(decoder.step(7), _logits(directory, [7]), rtol=1e-4, atol=1e-4)


def test_a_full_cache_and_an_empty_prompt_are_refused(tmp_path):
    decoder = Decoder(attention(tmp_path), capacity=4)
    with pytest.raises(InputError, match="got 0"):
        decoder.prefill(np.array([], np.int64))
    with pytest.raises(InputError, match="got 5"):
        decoder.prefill(np.arange(5))
    decoder.prefill(np.arange(4))
    with pytest.raises(InputError, match="room for 4"):
        decoder.step(1)


def test_generate_is_greedy_and_returns_only_what_is_new(tmp_path):
    directory = attention(tmp_path, eos=[])
    tokenizer = load_tokenizer(directory)
    prompt = "The old man went to the sea"
    ids = tokenizer.encode(prompt).ids
    found = generate(directory, prompt, new_tokens=12, threads=1)
    assert list(found.tokens) == _greedy(directory, ids, 12)
    assert tokenizer.decode(ids) + found.text == tokenizer.decode([*ids, *found.tokens])
    assert found.stopped == "new_tokens"
    assert found.first_token_ms > 0
    assert found.ms_per_token > 0
    json.dumps(found.to_json())


@pytest.mark.parametrize("as_list", [True, False])
def test_generate_stops_at_end_of_text_and_leaves_it_out(tmp_path, as_list):
    ids = load_tokenizer(attention(tmp_path, eos=[])).encode("Once upon").ids
    reference = _greedy(tmp_path, ids, 6)
    eos = reference[3]
    attention(tmp_path, eos=[4000, eos] if as_list else eos)
    found = generate(tmp_path, "Once upon", new_tokens=6)
    assert list(found.tokens) == reference[: reference.index(eos)]
    assert found.stopped == "end_of_text"


def test_generate_stops_when_the_context_is_full(tmp_path):
    directory = attention(tmp_path, eos=[], context=12)
    length = len(load_tokenizer(directory).encode("Once upon a time").ids)
    found = generate(directory, "Once upon a time", new_tokens=1000)
    assert len(found.tokens) == 12 - length
    assert found.stopped == "context"


def test_a_single_token_has_no_pace(tmp_path):
    assert generate(attention(tmp_path, eos=[]), "Once", new_tokens=1).ms_per_token is None


@pytest.mark.parametrize(("prompt", "count"), [("", 4), ("word " * 60, 4), ("fine", 0)])
def test_prompts_without_room_are_refused(tmp_path, prompt, count):
    with pytest.raises(InputError, match="expected"):
        generate(attention(tmp_path), prompt, count)


def test_a_damaged_configuration_is_named(tmp_path):
    (attention(tmp_path) / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(DamagedFileError, match="context_length"):
        generate(tmp_path, "hello", 2)


def test_a_decoder_without_logits_is_refused(tmp_path):
    model = onnx.load(attention(tmp_path) / "model.onnx")
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(InputError, match="an output named logits"):
        generate(tmp_path, "hello", 2)
