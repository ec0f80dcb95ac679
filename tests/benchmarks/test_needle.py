"""Prompts and lessons of the needle, its model beside transformers', and what the shipped one knows."""

from __future__ import annotations

import json
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from penstock.benchmarks.needle import answers, task  # noqa: E402
from penstock.benchmarks.needle.answers import ServerScore, TransformersScore, contexts, scores  # noqa: E402
from penstock.benchmarks.needle.captured import needle_layers  # noqa: E402
from penstock.benchmarks.needle.checkpoint import load, save, shipped  # noqa: E402
from penstock.benchmarks.needle.dense import claims  # noqa: E402
from penstock.benchmarks.needle.lessons import IGNORED, Lesson, make_batch  # noqa: E402
from penstock.benchmarks.needle.model import NeedleModel, NeedleShape, capture  # noqa: E402
from penstock.benchmarks.needle.task import TASKS, make_prompt, make_prompts, most_questions  # noqa: E402
from penstock.benchmarks.needle.train import STAGES, Stage, Trainer  # noqa: E402
from penstock.kernels.sparse.attention import attend  # noqa: E402

SMALL = NeedleShape(layers=2, hidden_size=32, intermediate_size=32, head_size=16)
SHORT = (
    Stage(lesson=Lesson(length=64, span=0), steps=4, sequences=2, rate=1e-3),
    Stage(lesson=Lesson(length=96, span=500, weight=4.0), steps=4, sequences=2, rate=1e-3),
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records(tokens, marker):
    """The four tokens after each marker."""
    return [tuple(tokens[at + 1 : at + 5]) for at, token in enumerate(tokens) if token == marker]


def looked_up(prompt):
    """The answer by reading the prompt's records one after the other, without knowing how it was made."""
    question = prompt.tokens[-9:] if prompt.task == "multiquery" else prompt.tokens[-2:]
    if prompt.task == "tracking":
        by_source = {(r[2], r[3]): (r[0], r[1]) for r in records(prompt.tokens, task.LET)}
        answer, at = [], tuple(question)
        while at in by_source:
            at = by_source[at]
            answer += at
        return tuple(answer)
    by_key = {(r[2], r[3]): (r[0], r[1]) for r in records(prompt.tokens, task.KEY)}
    if prompt.task == "multiquery":
        keys = list(zip(question[0:8:2], question[1:8:2], strict=True))
        return tuple(token for key in keys for token in (*key, *by_key[key]))
    return by_key[tuple(question)]


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(TASKS), st.integers(128, 3000), st.integers(0, 5))
def test_prompts_have_their_length_and_the_one_answer_that_their_records_give(name, length, seed):
    prompts = make_prompts(name, length, seed, min(3, most_questions(name, length)))
    assert prompts[0] == make_prompt(name, length, seed)
    for prompt in prompts:
        assert len(prompt.tokens) == length
        assert prompt.tokens[0] == task.BOS
        assert max(prompt.tokens) < task.VOCABULARY
        assert looked_up(prompt) == prompt.answer
        assert prompt.score(prompt.answer) == 1.0
        assert prompt.score(prompt.answer[1:-1]) < 1.0
    assert len({prompt.tokens[:-10] for prompt in prompts}) == 1
    assert len({prompt.tokens for prompt in prompts}) == len(prompts)


def test_needles_lie_all_over_the_context():
    places = [make_prompt("single", 1000, seed).tokens.index(task.KEY) for seed in range(60)]
    assert min(places) < 150
    assert max(places) > 850


@pytest.mark.parametrize(
    ("name", "length", "questions", "said"),
    [("tracking", 100, 1, "do not fit into 100"), ("single", 500, 2, "1 to 1 questions, not 2")],
)
def test_what_does_not_fit_is_refused(name, length, questions, said):
    with pytest.raises(ValueError, match=said):
        make_prompts(name, length, 0, questions)


@pytest.mark.parametrize("lesson", [*(stage.lesson for stage in SHORT), STAGES[-1].lesson])
def test_lessons_ask_often_and_only_for_what_was_said_before(lesson):
    batch = make_batch(lesson, 4, 7)
    assert torch.equal(batch.tokens, make_batch(lesson, 4, 7).tokens)
    asked = batch.targets != IGNORED
    assert asked.sum() > 0.1 * asked.numel()
    assert torch.equal(batch.targets[:, :-1][asked[:, :-1]], batch.tokens[:, 1:][asked[:, :-1]])
    for row, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        said = [record for marker in (task.KEY, task.LET) for record in records(row, marker)]
        context = {pair for record in said for pair in pairwise(record)}
        answers = [(now, nxt) for now, nxt in pairwise(targets) if now in task.C and nxt in task.D]
        assert set(answers) <= context


def test_positions_jump_between_records_and_never_inside_one():
    batch = make_batch(Lesson(length=128, span=9000), 8, 3)
    steps = batch.positions.diff(dim=1)
    assert steps.min() >= 1
    assert 3000 < batch.positions.max() < 9000 + 128
    inside = torch.isin(batch.tokens[:, :-1], torch.tensor([task.KEY, task.LET, task.ASK, task.TRACE]))
    assert (steps[inside] == 1).all()


def test_a_key_of_log_weight_log_n_counts_as_n_equal_keys():
    """The claim that training at short lengths rests on, for the first layer, which sees equal keys."""
    model = NeedleModel(NeedleShape(layers=1), torch.Generator().manual_seed(3))
    token, last = 20, 300
    many = torch.tensor([[token] * 7 + [last]])
    positions = torch.tensor([[5] * 7 + [6]])
    one = torch.tensor([[token, last]])
    weights = torch.tensor([[7.0, 1.0]]).log()
    with torch.inference_mode():
        expected = model.hidden(many, positions, torch.zeros(1, 8))[0, -1]
        found = model.hidden(one, torch.tensor([[5, 6]]), weights)[0, -1]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_both_ways_of_attention_are_one():
    model = NeedleModel(SMALL, torch.Generator().manual_seed(0))
    tokens = torch.randint(0, SMALL.vocabulary, (2, 50))
    with torch.inference_mode():
        torch.testing.assert_close(model.hidden(tokens), model.hidden(tokens, None, torch.zeros(2, 50)))


def test_a_written_checkpoint_is_transformers_llama_with_our_logits(tmp_path):
    model = NeedleModel(SMALL, torch.Generator().manual_seed(0))
    save(model, tmp_path, {"seed": 0})
    ours = load(tmp_path)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.randint(0, SMALL.vocabulary, (1, 200))
    with torch.inference_mode():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)
    bfloat = {name: weight.bfloat16().float() for name, weight in model.state_dict().items()}
    assert all(torch.equal(weight, bfloat[name]) for name, weight in ours.state_dict().items())


def test_a_training_goes_on_where_it_stopped(tmp_path):
    through = Trainer(1, SHORT, SMALL)
    losses = [found["loss"] for found in through.run()]
    first = Trainer(1, SHORT, SMALL)
    run = first.run()
    begun = [next(run)["loss"] for _ in range(5)]
    first.save(tmp_path / "state.pt")
    second = Trainer(1, SHORT, SMALL)
    second.resume(tmp_path / "state.pt")
    assert begun + [found["loss"] for found in second.run()] == losses
    assert all(
        torch.equal(ours, weight)
        for ours, weight in zip(second.model.parameters(), through.model.parameters(), strict=True)
    )
    with pytest.raises(ValueError, match="another seed or other stages"):
        Trainer(2, SHORT, SMALL).resume(tmp_path / "state.pt")


def test_captured_queries_and_keys_give_the_attention_of_the_model():
    model = load()
    tokens = torch.tensor(make_prompt("multikey", 200, 0).tokens)
    layers = capture(model, tokens)
    assert len(layers) == model.shape.layers
    shape = model.shape
    for layer in layers:
        assert layer.queries.shape == (shape.heads, 200, shape.head_size)
        assert layer.keys.shape == layer.values.shape == (shape.kv_heads, 200, shape.head_size)
    theirs = transformers.LlamaForCausalLM.from_pretrained(shipped(), dtype=torch.float32)
    with torch.inference_mode():
        cache = theirs(tokens[None], use_cache=True).past_key_values
    for number, layer in enumerate(layers):
        torch.testing.assert_close(layer.keys, cache.layers[number].keys[0], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(layer.values, cache.layers[number].values[0], rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def scored():
    return TransformersScore(shipped())


@pytest.mark.parametrize("name", TASKS)
def test_the_shipped_checkpoint_answers(scored, name):
    found = scores(name, 1024, 2, 0, scored)
    assert sum(found) / len(found) >= 0.85


def test_the_checkpoint_s_tokenizer_and_configuration_are_those_of_its_prompts():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(shipped() / "tokenizer.json"))
    tokens = make_prompt("tracking", 300, 0).tokens
    text = " ".join(task.words()[token] for token in tokens[1:])
    assert tuple(tokenizer.encode(text).ids) == tokens
    config = json.loads((shipped() / "config.json").read_text())
    assert config == load().shape.config()
    stages = json.loads((shipped() / "card.json").read_text())["stages"]
    assert msgspec.convert(stages, tuple[Stage, ...]) == STAGES


def test_a_claim_takes_the_worst_length_of_each_task():
    rows = [
        {"task": name, "tokens": tokens, "dense": share}
        for name, tokens, share in (("single", 1, 0.97), ("single", 2, 0.9), ("tracking", 1, 0.99))
    ]
    single, tracking = claims(rows)
    assert (single.value, single.holds) == (0.9, False)
    assert (tracking.value, tracking.holds) == (0.99, True)


def test_there_are_as_many_prompts_as_asked_for_and_contexts_are_used_up():
    asked = list(contexts("tracking", 600, 6, 0))
    assert [len(prompts) for prompts in asked] == [4, 4]
    assert [len(prompts) for prompts in contexts("single", 600, 3, 0)] == [1, 1, 1]
    shared = [task.shared_tokens(prompts) for prompts in asked]
    assert all(600 - 3 <= tokens < 600 for tokens in shared)


def test_a_server_is_sent_all_but_the_last_token_first(monkeypatch):
    sent = []

    def ask_all(url, model, asks):
        sent.extend(asks)
        return [SimpleNamespace(token_ids=prompt.answer)]

    prompt = make_prompt("multikey", 257, 0)
    monkeypatch.setattr(answers, "ask_all", ask_all)
    assert ServerScore("url", "model", decoded=True)([prompt]) == [1.0]
    before, whole = (ask.prompt.split() for ask in sent)
    assert before == whole[:-1]
    assert len(whole) == 256  # the tokenizer adds the first
    assert [ask.max_tokens for ask in sent] == [1, 2]


def test_layers_for_the_selectors_give_the_attention_of_the_steps_that_answer():
    model = load()
    prompt = make_prompt("tracking", 300, 4)
    (layers,) = needle_layers(model, ["tracking"], 300, [4])[1:2]
    found = capture(model, torch.tensor(prompt.tokens + prompt.answer[:-1]))[1]
    steps = list(layers[0].steps())
    assert len(steps) == len(prompt.answer)
    query, keys, values = steps[0]
    assert keys.shape[1] == 300
    for number, (query, keys, values) in enumerate(steps):
        expected = torch.nn.functional.scaled_dot_product_attention(
            found.queries[:, 299 + number][:, None],
            keys.repeat_interleave(4, 0),
            values.repeat_interleave(4, 0),
        )
        torch.testing.assert_close(attend(query, keys, values).output.flatten(0, 1), expected[:, 0])
