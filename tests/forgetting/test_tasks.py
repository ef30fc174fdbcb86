# SPDX-License-Identifier: Apache-2.0
"""Loading tasks: by name, path and dict, and what is said when one cannot be had."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_lora.errors import Notice, TaskError
from lightning_lora.forgetting.catalogue import Catalogue
from lightning_lora.forgetting.tasks import load_tasks
from tests.forgetting import tiny


def inline(path: Path, name: str = "inline", **changes: Any) -> dict[str, Any]:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        **changes,
    }


def test_yaml_dict_and_name_load_together(task_folder: Path) -> None:
    specs = [str(task_folder / "alpha.yaml"), inline(task_folder / "beta.jsonl"), "beta"]
    tasks = load_tasks(specs, include_path=str(task_folder))
    assert {name: task.n_docs for name, task in tasks.items()} == {"alpha": 40, "inline": 20, "beta": 20}


def test_group_of_ones_own_is_taken_apart(task_folder: Path, tmp_path: Path) -> None:
    for name in ("alpha", "beta"):
        for suffix in (".yaml", ".jsonl"):
            (tmp_path / f"{name}{suffix}").write_text((task_folder / f"{name}{suffix}").read_text())
        text = (tmp_path / f"{name}.yaml").read_text().replace(f"{name}.jsonl", str(tmp_path / f"{name}.jsonl"))
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [alpha, beta]\n")
    assert list(load_tasks("both", include_path=tmp_path)) == ["alpha", "beta"]
    with pytest.raises(TaskError, match="is a group.*include_path"):
        load_tasks(str(tmp_path / "both.yaml"))


def test_loading_leaves_the_random_state_and_prints_no_bars(
    task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = random.getstate()
    load_tasks(str(task_folder / "alpha.yaml"))
    assert random.getstate() == before
    assert "%|" not in capsys.readouterr().err


def test_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(TaskError, match="'helaswag' is unknown to lm-eval.*Near names: hellaswag"):
        load_tasks("helaswag")


def test_unknown_name_in_a_folder_of_ones_own(task_folder: Path) -> None:
    catalogue = Catalogue(task_folder, shipped=task_folder / "nothing")
    assert "alpha" in catalogue.names()
    with pytest.raises(TaskError, match="include_path: .* is no folder"):
        Catalogue(task_folder / "nothing")


def test_shipped_names_are_found_without_the_full_index() -> None:
    catalogue = Catalogue()
    for name in ("arc_easy", "winogrande", "mmlu_stem"):
        index = catalogue.find(name).task_index
        assert name in index
        assert len(index) < 500  # the full index has more than ten thousand


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", "broken.jsonl is empty"),
        (
            '{"context": "a", "choices": ["b", "c"], "gold": 0}\n{"context": "a", "choi',
            "broken.jsonl, line 2 is no JSON",
        ),
        ('{"context": "a", "choices": ["b", "c"], "gold": 0}\n[1, 2]\n', "line 2 is a JSON list, not an object"),
        ("[]", "broken.jsonl holds no item"),
        ("{}", "broken.jsonl holds no item"),
        ("3", "broken.jsonl is a JSON int"),
        ('{"context": "a", "gold": 0}\n', "'inline'"),
        (
            '{"context": "a", "choices": ["b", "c"], "gold": 0}\n{"context": "a", "choices": ["b", "c"], "gold": 7}\n',
            "item 2 of 2: its label names none of its choices",
        ),
        ('{"context": "a", "choices": ["b"], "gold": 0}\n', "item 1 of 1: it has 1 choice"),
    ],
)
def test_broken_file_is_named(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "broken.jsonl"
    path.write_text(lines)
    with pytest.raises(TaskError, match=message):
        load_tasks(inline(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing/task.yaml", "'missing/task.yaml' does not exist"),
        ({"dataset_path": "json"}, "needs the key `task`"),
        ([], "`tasks` is empty"),
        (inline(Path("gone.jsonl")), "its file 'gone.jsonl' does not exist"),
        ({"task": "x", "output_type": "generate_until", "dataset_path": "json"}, "output_type 'generate_until'"),
        ({"task": "x", "dataset_path": "json"}, "says none: add `output_type: multiple_choice`"),
        (inline(Path("x"), dataset_kwargs={}), "'inline' has `dataset_path: json` and names no file.*data_files"),
    ],
)
def test_bad_spec_is_refused(spec: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_tasks(spec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_split": "train2"}, "Correct its `test_split`: the data set has the splits test"),
        (
            {"doc_to_text": "{{nope}}"},
            "`doc_to_text` \\('{{nope}}'\\): the items have the fields context, choices, gold",
        ),
        (
            {"doc_to_text": "{{context"},
            "`doc_to_text` \\('{{context'\\): the items have the fields context, choices, gold",
        ),
        ({"doc_to_choice": "nope"}, "`doc_to_choice` \\('nope'\\): the items have the fields context, choices, gold"),
        ({"doc_to_choice": None}, "`doc_to_choice` \\(None\\): the items have the fields context, choices, gold"),
        ({"doc_to_target": "{{x}}"}, "`doc_to_target` \\('{{x}}'\\): the items have the fields context, choices, gold"),
        ({"doc_to_target": "label"}, "its label names none of its choices: `doc_to_target` gives 'label'"),
    ],
)
def test_wrong_template_or_split_is_named_with_what_there_is(
    task_folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError, match=message):
        load_tasks(inline(task_folder / "beta.jsonl", **changes))


def test_bad_yaml_is_refused(tmp_path: Path, task_folder: Path) -> None:
    (tmp_path / "torn.yaml").write_text("task: [unclosed\n")
    with pytest.raises(TaskError, match="torn.yaml cannot be read"):
        load_tasks(str(tmp_path / "torn.yaml"))
    (tmp_path / "anonymous.yaml").write_text("dataset_path: json\n")
    with pytest.raises(TaskError, match="no key `task`"):
        load_tasks(str(tmp_path / "anonymous.yaml"))


def test_one_name_twice_or_the_pooled_name_is_refused(task_folder: Path) -> None:
    with pytest.raises(TaskError, match="'alpha' twice"):
        load_tasks([str(task_folder / "alpha.yaml")] * 2)
    with pytest.raises(TaskError, match="'pooled'.*Rename"):
        load_tasks(inline(task_folder / "alpha.jsonl", name="pooled"))


def test_fewshot_prompts_are_those_of_a_pass_over_the_whole_task(task_folder: Path) -> None:
    spec = inline(task_folder / "alpha.jsonl")
    few = load_tasks(spec, num_fewshot=2)["inline"]
    prompts = prompts_of(few, list(range(40)))
    assert len(set(prompts)) == 40
    few.choose([3, 17, 30])
    assert prompts_of(few, [3, 17, 30]) == [prompts[i] for i in (3, 17, 30)]
    with pytest.raises(TaskError, match="cannot draw 100 few-shot examples"):
        load_tasks(spec, num_fewshot=100)
    zero = load_tasks(inline(task_folder / "alpha.jsonl", num_fewshot=0), num_fewshot=2)["inline"]
    assert zero.shots is None  # a task that says 0 keeps 0


def prompts_of(task: Any, ids: list[int]) -> list[str]:
    task.choose(ids)
    task.task.build_all_requests(samples=ids)
    return [request.args[0] for request in task.task.instances if request.idx == 0]


def test_hub_out_of_reach_fails_soon_and_says_the_way_out(tmp_path: Path) -> None:
    """Three hub tasks, a hub that is not there: one question, one error."""
    script = (
        "import time, json\n"
        "from lightning_lora.forgetting.tasks import load_tasks\n"
        "start = time.time()\n"
        "try:\n    load_tasks(['arc_easy', 'hellaswag', 'winogrande'])\n"
        "except Exception as error:\n    print(json.dumps([type(error).__name__, str(error), time.time() - start]))\n"
    )
    env = {
        **os.environ,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=900)
    name, message, seconds = json.loads(done.stdout.strip().splitlines()[-1])
    assert name == "TaskError"
    assert "'arc_easy'" in message
    assert "dataset_path: json" in message
    assert "data_files" in message
    assert "HF_HUB_OFFLINE=1" in message
    assert seconds < 30


def test_a_group_id_comes_from_the_field_that_the_task_names(task_folder: Path, tmp_path: Path) -> None:
    from lightning_lora.forgetting.scoring import Scorer

    docs = [{**doc, "passage": f"passage {number // 3}"} for number, doc in enumerate(tiny.items(9))]
    tasks = load_tasks(tiny.write_task(tmp_path, "passages", docs, metadata={"cluster_by": "passage"}))
    scorer = Scorer(tiny.llama(), tiny.tokenizer())
    with scorer.quietly():
        groups = [score.group for score in scorer.score(tasks, {"passages": range(9)})["passages"]]
    assert [groups.index(group) for group in groups] == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    assert load_tasks(task_folder / "alpha.yaml")["alpha"].cluster_by is None
    with pytest.raises(TaskError, match="cluster_by: nothing.*fields context, choices, gold"):
        load_tasks(tiny.write_task(tmp_path, "wrong", tiny.items(3), metadata={"cluster_by": "nothing"}))


@pytest.mark.parametrize(
    ("name", "field"),
    [("multirc", "paragraph"), ("belebele_eng_Latn", "flores_passage"), ("kobest_boolq", "paragraph")],
)
def test_passages_of_lm_evals_own_tasks_are_known(name: str, field: str, tmp_path: Path) -> None:
    docs = [{**doc, field: f"Passage {number // 2}"} for number, doc in enumerate(tiny.items(4))]
    task = load_tasks(tiny.write_task(tmp_path, name, docs))[name]
    assert task.cluster_by == field
    assert len(set(task.groups() or [])) == 2
    own = tiny.write_task(tmp_path / "own", name, tiny.items(4))  # another task of that name, without the field
    assert load_tasks(own)[name].cluster_by is None


def test_a_long_text_in_several_items_is_asked_about(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    def task(name: str, texts: list[str], **changes: Any) -> None:
        docs = [{**doc, "story": text} for doc, text in zip(tiny.items(len(texts)), texts, strict=True)]
        load_tasks(tiny.write_task(tmp_path, name, docs, **changes))

    task("apart", [f"{i} {'long ' * 60}" for i in range(4)])
    task("instruction", ["one instruction for all " * 20] * 4)
    task("short", ["one", "one", "two", "two"])
    task("declared", [f"{i // 2} {'long ' * 60}" for i in range(4)], metadata={"cluster_by": "story"})
    assert not [w for w in recwarn if issubclass(w.category, Notice)]
    with pytest.warns(Notice, match="'repeated' has items with one and the same long 'story'.*cluster_by: story"):
        task("repeated", [f"{i // 2} {'long ' * 60}" for i in range(4)])


CODE = {
    "unsafe_code": ({"unsafe_code": True}, "executes what the model writes"),
    "remote": ({"dataset_kwargs": {"trust_remote_code": True}}, "executes its data set's own code"),
    "script": ({"dataset_path": "/somewhere/data.py"}, "executes its data set's own code"),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_is_executed_only_where_the_task_is_named(kind: str, task_folder: Path) -> None:
    changes, said = CODE[kind]
    spec = inline(task_folder / "beta.jsonl", **changes)
    if kind == "remote":
        spec["dataset_kwargs"] = {**changes["dataset_kwargs"], "data_files": {"test": str(task_folder / "beta.jsonl")}}
    for allowed in ((), ("another",)):
        with pytest.raises(TaskError, match=f"{said}.*`allow_code=\\['inline'\\]`"):
            load_tasks(spec, allow_code=allowed)
    if kind != "script":
        assert load_tasks(spec, allow_code=["inline"])["inline"].n_docs == 20


def test_no_python_of_a_refused_task_runs(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "utils.py").write_text(
        f"open({str(ran)!r}, 'a').write('x')\ndef text(doc):\n    return doc['context']\n"
    )
    path = tiny.write_task(tmp_path, "evil", tiny.items(4), unsafe_code=True)
    path.write_text(path.read_text().replace("doc_to_text: context", "doc_to_text: !function utils.text"))
    with pytest.raises(TaskError, match="executes what the model writes"):
        load_tasks(path)
    assert not ran.exists()
    assert load_tasks(path, allow_code=["evil"])["evil"].n_docs == 4
    assert ran.exists()


@pytest.mark.parametrize("name", ["humaneval", "mbpp", "humaneval_instruct"])
def test_tasks_of_lm_evals_own_that_execute_code_are_refused(name: str) -> None:
    """The last one says so only in a file that it includes."""
    with pytest.raises(TaskError, match=f"Task '{name}' executes what the model writes"):
        load_tasks(name)


def test_the_mini_suite_loads_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = load_tasks("smoke")
    assert {name: task.n_docs for name, task in tasks.items()} == {"smoke_function_words": 64, "smoke_word_order": 64}


def test_presets_stand_for_tasks_each_once() -> None:
    from lightning_lora.forgetting.presets import PRESETS, expand

    assert expand(["lora_learns_less"]) == ["hellaswag", "arc_challenge", "winogrande"]
    assert expand(["quick", "lora_learns_less", "boolq"]) == [*PRESETS["quick"], "arc_challenge", "boolq"]
    catalogue = Catalogue()
    for name in (*PRESETS["quick"], *PRESETS["lora_learns_less"]):
        assert name in catalogue.find(name).task_index
    assert not PRESETS.keys() & set(catalogue.names())  # no task of lm-eval's is hidden by one


def test_names_are_found_in_milliseconds() -> None:
    import time

    for name in ("hellaswag", "mmlu", "ai2_arc", "super-glue-lm-eval-v1"):
        Catalogue().find(name)
        start = time.process_time()
        Catalogue().find(name)
        assert time.process_time() - start < 0.2, name  # the full index takes ten seconds


@pytest.mark.slow
def test_names_are_found_within_a_second_and_whole(tmp_path: Path) -> None:
    """In a fresh process, against the full index."""
    script = """
import time, logging
logging.disable(logging.WARNING)
import lm_eval.tasks
from lightning_lora.forgetting.catalogue import Catalogue, leaf_configs
start = time.process_time()
Catalogue().find("hellaswag")
assert time.process_time() - start < 1.0, time.process_time() - start
full = lm_eval.tasks.TaskManager()
for name in ("ai2_arc", "super-glue-lm-eval-v1", "mmlu", "blimp", "glue", "self_consistency"):
    index = Catalogue().find(name).task_index
    own, all_ = ({c["task"] for c in leaf_configs(name, i)} for i in (index, full.task_index))
    assert own == all_, name
    assert len(index) < 100, name
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk"])
def test_an_official_task_over_files_of_ones_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    from lightning_lora.forgetting.offline import write_offline_task

    docs = [
        {
            "id": str(number), "question": f"question {number}?", "answerKey": "ABCD"[number % 4],
            "choices": {"text": [f"answer {k}" for k in range(4)], "label": list("ABCD")},
        }
        for number in range(6)
    ]  # fmt: skip
    data, place = Dataset.from_list(docs), tmp_path / ("test" if kind == "save_to_disk" else f"test.{kind}")
    {"jsonl": data.to_json, "parquet": data.to_parquet, "save_to_disk": data.save_to_disk}[kind](str(place))
    path = write_offline_task("arc_easy", {"test": place}, tmp_path / "sub" / "arc_easy.yaml")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = load_tasks(path)["arc_easy"]
    assert task.n_docs == 6
    doc = list(task.task.eval_docs)[3]
    assert task.task.doc_to_text(doc) == "Question: question 3?\nAnswer:"  # the official prompt
    assert task.gold(doc, task.task.doc_to_target(doc)) == {3}


def test_offline_task_says_what_is_missing(tmp_path: Path, task_folder: Path) -> None:
    from lightning_lora.forgetting.offline import write_offline_task

    lines = task_folder / "alpha.jsonl"
    out = tmp_path / "out.yaml"
    with pytest.raises(TaskError, match="needs the split\\(s\\) test: got files for train"):
        write_offline_task("arc_easy", {"train": lines}, out)
    with pytest.raises(TaskError, match="is a group: write a file for each"):
        write_offline_task("mmlu", {"test": lines}, out)
    with pytest.raises(TaskError, match="there is no file at"):
        write_offline_task("arc_easy", {"test": tmp_path / "no.jsonl"}, out)
    with pytest.raises(TaskError, match="is none of .jsonl"):
        write_offline_task("arc_easy", {"test": task_folder / "alpha.yaml"}, out)
    assert not out.exists()
