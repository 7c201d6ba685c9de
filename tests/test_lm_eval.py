"""The harness's own evaluation of a small run: every number as the parallel pass gives it."""

import json
import math
import sys

import pytest
import torch

from ctxkv_lightning.errors import UserError
from ctxkv_lightning.lm.sampling import Sampler
from ctxkv_lightning.use import open_trained
from ctxkv_lightning.write import Writer
from tests.lm.test_generate import parallel_logits
from tests.small_run import small_run

pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
pytestmark = pytest.mark.filterwarnings("default")  # what the harness's own dependencies warn of is not ours

RECORDS = [
    {"text": "Zeile 3: die Größe von 9 beträgt", "choices": [" 3 €", " naïve 🙂", " x"], "answer": 0},
    {"text": "Zeile 8: die Größe", "choices": [" von 64", " ordnung", " 🙂🙂"], "answer": 1},
    {"text": "and then some ", "choices": ["English words.", "Zeile", "e"], "answer": 2},
]
TASKS = {
    "choice": (
        "output_type: multiple_choice\ndoc_to_text: '{{text}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: answer\n"
        "target_delimiter: ''\nmetric_list: [{metric: acc}]\n"
    ),
    "rolling": (
        "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    ),
    "writing": (
        "output_type: generate_until\ndoc_to_text: '{{text}}'\ndoc_to_target: 'x'\n"
        "generation_kwargs: {until: ['\\n', 'e'], max_gen_toks: 12, do_sample: false, temperature: 0.0}\n"
        "metric_list: [{metric: exact_match}]\n"
    ),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run."""
    return small_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def evaluator(run):
    """The adapter on this run."""
    from ctxkv_lightning.lm_eval_adapter import ContextKVEvaluation

    return ContextKVEvaluation(str(run))


@pytest.fixture(scope="module")
def results(run, tmp_path_factory):
    """What the harness says of the local tasks, with the samples."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import ctxkv_lightning.lm_eval_adapter  # noqa: F401  (registers `ctxkv`)

    folder = tmp_path_factory.mktemp("tasks")
    (folder / "data.json").write_text("\n".join(json.dumps(record) for record in RECORDS))
    for name, text in TASKS.items():
        files = f"{{data_files: {{test: {folder / 'data.json'}}}}}"
        data = f"dataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: ctxkv_{name}\n{data}{text}")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return simple_evaluate(
        model="ctxkv", model_args=f"run={run}", tasks=[f"ctxkv_{name}" for name in TASKS], task_manager=manager
    )


def answers(results, name):
    """What the model answered to each record."""
    return [
        sample["filtered_resps"] for sample in sorted(results["samples"][f"ctxkv_{name}"], key=lambda s: s["doc_id"])
    ]


def log_likelihood(trained, before, after):
    """Sum of log-probabilities of token ids `after` the ids `before`, and whether each is the likeliest."""
    ids = torch.tensor([*before, *after])
    logs = parallel_logits(trained.model, ids).double().log_softmax(-1)[len(before) - 1 : -1]
    return float(logs[range(len(after)), after].sum()), logs.argmax(-1).tolist() == list(after)


def test_choices_have_the_likelihoods_of_the_parallel_pass(run, results):
    trained = open_trained(run)
    encode = trained.encoding.encode_ordinary
    right = 0
    for record, found in zip(RECORDS, answers(results, "choice"), strict=True):
        expected = []
        for choice in record["choices"]:
            bare = record["text"].rstrip()
            before, whole = encode(bare), encode(record["text"] + choice)
            assert whole[: len(before)] == before
            expected.append(log_likelihood(trained, before, whole[len(before) :]))
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
        assert [bool(one[1]) for one in found] == [one[1] for one in expected]
        right += max(range(3), key=lambda i: expected[i][0]) == record["answer"]
    assert results["results"]["ctxkv_choice"]["acc,none"] == pytest.approx(right / len(RECORDS))


def test_rolling_is_the_whole_text_after_what_separates_documents(run, results):
    trained = open_trained(run)
    encode = trained.encoding.encode_ordinary
    logs = [log_likelihood(trained, encode("\n\n"), encode(record["text"]))[0] for record in RECORDS]
    found = [float(answer[0] if isinstance(answer, list | tuple) else answer) for answer in answers(results, "rolling")]
    assert found == [pytest.approx(log, abs=1e-3) for log in logs]
    size = sum(len(record["text"].encode()) for record in RECORDS)
    assert results["results"]["ctxkv_rolling"]["bits_per_byte,none"] == pytest.approx(-sum(logs) / size / math.log(2))


def test_writing_is_greedy_and_ends_before_the_stop_string(run, results):
    writer = Writer(open_trained(run), Sampler(0.0), max_tokens=12)
    for record, found in zip(RECORDS, answers(results, "writing"), strict=True):
        text = writer.text(record["text"])[0]
        assert found == [text.split("\n")[0].split("e")[0]]


class Request:
    def __init__(self, *args):
        self.args = args


def test_one_continuation_at_a_time(evaluator):
    encode = evaluator.trained.encoding.encode_ordinary
    pairs = [("", "Zeile 4"), ("Zeile", ""), ("Zeile 4: die Gr", "öße von"), ("  ", "x"), ("die" * 900, " Größe")]
    found = evaluator.loglikelihood([Request(*pair) for pair in pairs])
    assert found[0] == pytest.approx(log_likelihood(evaluator.trained, encode("\n\n"), encode("Zeile 4")), abs=1e-3)
    assert found[1] == (0.0, True)
    whole, alone = encode("Zeile 4: die Größe von"), encode("Zeile 4: die Gr")
    shared = next(i for i in range(len(whole)) if whole[: i + 1] != alone[: i + 1])
    assert found[2][0] == pytest.approx(log_likelihood(evaluator.trained, whole[:shared], whole[shared:])[0], abs=1e-3)
    assert found[3][0] == pytest.approx(log_likelihood(evaluator.trained, encode("\n\n"), encode("  x"))[0], abs=1e-3)
    assert all(math.isfinite(value) and value <= 0 for value, _ in found)


def test_a_sampled_text_follows_its_options_and_an_empty_context_is_allowed(evaluator):
    options = {"until": "e", "temperature": 0.9, "top_p": 0.9, "top_k": 50, "max_gen_toks": 9}
    (text,) = evaluator.generate_until([Request("Zeile", {**options, "do_sample": True})])
    writer = Writer(evaluator.trained, Sampler(0.9, 50, 0.9, evaluator.seed), 9, ["e"])
    assert text == writer.text("Zeile")[0]
    assert isinstance(evaluator.generate_until([Request("", options)])[0], str)


def test_answers_go_into_the_harnesss_cache(evaluator, monkeypatch):
    kept = []
    monkeypatch.setattr(evaluator.cache_hook, "add_partial", lambda *entry: kept.append(entry))
    answer = evaluator.loglikelihood_rolling([Request("Zeile 4")])[0]
    assert kept == [("loglikelihood_rolling", ("Zeile 4",), answer)]


def test_without_the_harness_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("lm_eval")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "ctxkv_lightning.lm_eval_adapter", raising=False)
    with pytest.raises(UserError, match=r"pip install 'ctxkv-lightning\[eval\]'"):
        __import__("ctxkv_lightning.lm_eval_adapter")
