"""The report: one page without anything from outside, that shows what the run folder holds, whatever is missing."""

import math
import re
from html.parser import HTMLParser

import pytest

from training.recipe import load
from training.report import write_report
from training.report.curves import smooth
from training.report.lineage import drawing
from training.report.samples import response_html
from training.report.tables import TIMES, rejections_of
from training.run_dir import RunDir

POLICIES = ("base", "zero", "sft1", "rl_reasoning", "sft2", "rl_all", "distill-qwen2", "distill-llama")
NASTY = '<script>alert("1")</script> & <think> 1 plus 2 </think> <answer> 3 </answer>'


def grpo_row(step, steps, levels=()):
    done = step / steps
    return {
        "step": step,
        "reward": 0.4 + 1.5 * done,
        "reward/accuracy": 0.2 + 0.7 * done,
        "reward/format": 0.3 + 0.65 * done,
        "accuracy": 0.2 + 0.7 * done + 0.03 * math.sin(step),
        "format": 0.3 + 0.65 * done,
        "language_consistency": 0.4 + 0.2 * done,
        "length": 40 - 8 * done,
        **{f"accuracy/{times} times": min(1.0, 0.2 + 1.5 * done / times) for times in levels},
        **{f"length/{times} times": 12 + 3 * times * done for times in levels},
        "entropy": 1.2 - done,
        "kl": 0.02 * done,
        "zero_std_groups": 0.6 * done,
        "loss": 0.001,
        "expert_load": 1.5 - 0.2 * done,
        "rollout_tokens_per_second": 12345.0,
        "sampler_gap": 1e-6,
        "sampler_gap_max": 3e-5,
        "stale": 0.0,
        **{f"{part}_seconds": 0.1 * (index + 1) for index, part in enumerate(TIMES)},
    }


def sample(problem, checkpoint, kind="reasoning", right=True, **more):
    text = f"<think> 12 plus 3{problem} makes 4 carry 0 </think> <answer> 4{problem} </answer>"
    rewards = {
        "format": 1.0,
        "language_consistency": 0.5,
        **({"accuracy": float(right)} if kind == "reasoning" else {}),
    }
    question = f"12 plus 3{problem}" if kind == "reasoning" else f"tell me about {problem}"
    return {
        "checkpoint": checkpoint,
        "split": "test",
        "problem_id": f"{kind}-{problem}",
        "language": "en" if problem % 2 else "de",
        "kind": kind,
        "question": question,
        "text": NASTY if problem == 0 and checkpoint == "base" else text,
        "rewards": rewards,
        "finished": checkpoint != "base",
        **more,
    }


def finish(run, name, metrics, rows=(), samples=(), data=()):
    stage = run.stage(name)
    stage.begin({}, {})
    for row in rows:
        stage.log(**row)
    stage.add_samples(samples)
    for file, content in data:
        stage.write_data(file, content)
    stage.finish(metrics)


def whole_run(path):
    """A run with invented numbers, in every shape that the stages write."""
    run = RunDir(path)
    run.write_recipe(load("tiny", ["seed=3"]))
    losses = [
        {"step": step, "loss": 4 / (1 + step / 20), "expert_load": 1.2 + 1 / (1 + step)}
        for step in range(120)
    ]
    finish(run, "base", {"loss": 0.6}, losses)
    for name in ("zero", "rl_reasoning", "rl_all"):
        rolled = [
            sample(step % 7, name, step=step, reward=1.0 + step / 60, advantage=0.5) for step in range(60)
        ]
        unseen = {"unseen/helpful/before": 0.61, "unseen/helpful/after": 0.875} if name == "rl_all" else {}
        levels = (2, 5) if name == "zero" else ()
        steps = [grpo_row(step, 60, levels) for step in range(60)]
        finish(run, name, {"reward": 1.9, **unseen}, steps, rolled)
    routes = {
        f"{route}/{key}": value
        for route in ("few_shot", "reflect", "refine")
        for key, value in (("asked", 90), ("kept", 30))
    }
    cold = {
        "asked": 270,
        "kept": 90,
        **routes,
        "few_shot/rejected/mixed_language": 40,
        "refine/rejected/mixed_language": 2,
    }
    rejected = [
        {"filter": "mixed_language", "reason": "3 of 9", "question": "1 plus 2", "response_text": NASTY}
    ]
    finish(run, "cold_start", cold, data=[("data.jsonl", [{}]), ("rejected.jsonl", rejected)])
    finish(run, "sft1", {"loss": 0.5}, losses[:20])
    finish(run, "judge", {"agreement": 0.971, "held_out": 200}, losses[:30])
    finish(
        run,
        "rejection",
        {"asked": 400, "kept": 320, "rejections": {"wrong_by_rule": 30, "code_block": 5}},
        data=[("data.jsonl", [{}]), ("rejected.jsonl", rejected)],
    )
    finish(run, "sft2", {"loss": 0.4}, losses[:20])
    parts = [{"part": part, **row} for part in ("helpful", "safety") for row in losses[:10]]
    finish(run, "reward_models", {"helpful/accuracy": 0.93, "safety/accuracy": 0.99}, parts)
    parts = [{"part": part, **row} for part in ("qwen2", "llama") for row in losses[:40]]
    students = {f"{name}/parameters": 107_000 for name in ("qwen2", "llama")}
    finish(run, "distill", {"asked": 300, "kept": 290, "rejections": {}, **students}, parts)
    rows = []
    for index, name in enumerate(POLICIES):
        for split in ("test", "harder", "hardest"):
            for language in ("all", "de", "en"):
                accuracy = (0.2 + 0.1 * index) * {"test": 1, "harder": 0.4, "hardest": 0.1}[split]
                rows.append(
                    {
                        "checkpoint": name,
                        "split": split,
                        "language": language,
                        "problems": 1024,
                        "accuracy": accuracy,
                        "wilson_low": accuracy - 0.01,
                        "wilson_high": accuracy + 0.01,
                        "format": 0.9,
                        "language_consistency": 0.6 + 0.05 * index,
                        "length": 40.5,
                        "pass@1": 0.8,
                        "pass@k": 0.9,
                        "maj@k": 0.85,
                        "greedy": 0.87,
                        "greedy_low": 0.85,
                        "greedy_high": 0.89,
                        "helpful": None if name == "base" else 0.5,
                        "harmless": 0.75,
                    }
                )
                if name in ("base", "zero") and language == "all":
                    rows[-1] |= {"reach": {"1": accuracy, "2": 0.3, "4": 0.5}, "reach_problems": 64}
    shown = [
        sample(problem, name, right=index > problem)
        for index, name in enumerate(POLICIES)
        for problem in range(6)
    ]
    shown += [sample(problem, name, kind="unsafe") for name in POLICIES for problem in range(2)]
    finish(run, "evaluate", {}, samples=shown, data=[("evaluation.jsonl", rows)])
    return run


class Strict(HTMLParser):
    """Collects tags, attributes and visible text, and notices tags that are not closed."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.attributes, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parsed(path):
    page = Strict()
    page.feed(path.read_text())
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(whole_run(tmp_path_factory.mktemp("run")))


def test_every_section_is_there_with_its_numbers(report):
    page = parsed(report)
    text = " ".join(page.text)
    assert "tiny: every stage of DeepSeek-R1" in text
    for heading in (
        "Stages",
        "Lineage",
        "Curves",
        "The same problem, stage by stage",
        "Rejections by filter",
        "Expert load",
        "Language mix",
        "Where the time went",
    ):
        assert heading in text
    assert "distill-llama" in text
    assert "90 of 270 responses kept" in text
    assert "agrees with the rule on 97.1 % of 200 held-out responses" in text
    assert "helpful 93.0 %, safety 99.0 %" in text
    assert "near 0 by construction" in text
    assert "0.610" in text
    assert "0.875" in text
    assert "1,024 held-out problems" in text
    # of the parts of a step, 0.1 s to 0.6 s, the rollout is the first
    assert "tokens per second" in text and "12,345 4.8 % 1.0e-06 3.0e-05 recomputed 0.0 %" in text
    assert text.count("pass@4") >= 1
    assert ("title", "95 % interval 85.0 to 89.0") in page.attributes  # of greedy accuracy
    for stage in ("zero", "rl_reasoning", "rl_all", "base", "sft1"):
        assert ("aria-label", f"curves of {stage}") in page.attributes


def test_the_page_takes_nothing_from_outside(report):
    page = parsed(report)
    assert not {"script", "link", "iframe", "img", "base"} & set(page.tags)
    for name, value in page.attributes:
        if name in ("href", "src", "xlink:href"):
            assert value.startswith("#")
    assert "@import" not in report.read_text()


def test_sampled_text_cannot_become_markup(report):
    assert "<script>" not in report.read_text()
    assert "&lt;script&gt;" in report.read_text()


def test_ids_are_unique_and_references_find_them(report):
    text = report.read_text()
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    references = re.findall(r"url\(#([^)]+)\)", text) + re.findall(r'href="#([^"]+)"', text)
    assert references
    assert set(references) <= set(ids)


def test_colours_of_curves_follow_the_page(report):
    curves = re.findall(
        r'<svg role="img" aria-label="curves of zero".*?</svg>', report.read_text(), re.DOTALL
    )
    assert len(curves) == 1
    assert "var(--series-0)" in curves[0]
    assert set(re.findall(r"#[0-9a-f]{6}", curves[0])) <= {"#000000", "#ffffff"}


def test_accuracy_and_length_of_every_level_are_drawn(report):
    picture = re.search(
        r'<svg role="img" aria-label="levels of zero".*?</svg>', report.read_text(), re.DOTALL
    )
    assert picture
    for text in ("accuracy by level", "length by level", "against length", "2 times", "5 times"):
        assert text in picture.group()


def test_pass_at_k_is_drawn_for_every_split_that_was_measured(report):
    (picture,) = re.findall(r'<svg role="img" aria-label="reach".*?</svg>', report.read_text(), re.DOTALL)
    for text in ("test (%)", "harder (%)", "hardest (%)", "base", "zero"):
        assert text in picture


def test_the_report_of_the_same_run_is_the_same_bytes(tmp_path, report):
    again = write_report(RunDir(report.parent), tmp_path / "again.html")
    assert again.read_bytes() == report.read_bytes()


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    run = RunDir(tmp_path)
    run.write_recipe(load("tiny"))
    page = parsed(write_report(run))
    text = " ".join(page.text)
    assert "0 of 12 stages done" in text
    assert "not done" in text
    assert "Rejections by filter" not in text


def test_the_lineage_of_few_stages_is_drawn_as_small_as_it_is():
    for stages in (["base", "zero"], ["base", "zero", "cold_start", "sft1"]):
        svg = drawing(load("tiny", [f"stages={stages}"]), {})
        width = re.findall(r'viewBox="0 0 (\d+) ', svg)[0]
        assert f"max-width: {width}px" in svg


def test_a_run_in_the_middle_shows_its_curves(tmp_path):
    run = RunDir(tmp_path)
    run.write_recipe(load("tiny"))
    stage = run.stage("zero")
    stage.begin({}, {})
    stage.log(step=0, reward=0.5, loss=0.0, accuracy=float("nan"))
    assert ("aria-label", "curves of zero") in parsed(write_report(run)).attributes


def test_a_response_shows_its_thinking_and_answer():
    html = response_html("<think> 1 plus 2 </think> makes <answer> 3 </answer>")
    assert '<span class="think">1 plus 2</span>' in html
    assert '<span class="answer">3</span>' in html
    assert '<span class="tag">&lt;think&gt;</span>' in html
    plain = re.sub(r"<[^>]+>", "", html)
    assert plain == "&lt;think&gt; 1 plus 2 &lt;/think&gt; makes &lt;answer&gt; 3 &lt;/answer&gt;"


def test_a_malformed_response_loses_no_text():
    text = "</answer> a < b <answer> 3 </answer> <answer> 3 </answer> & more"
    html = response_html(text)
    assert (
        re.sub(r"<[^>]+>", "", html)
        == "&lt;/answer&gt; a &lt; b &lt;answer&gt; 3 &lt;/answer&gt; &lt;answer&gt; 3 &lt;/answer&gt; &amp; more"
    )


def test_rejections_are_summed_over_routes():
    metrics = {
        "few_shot/rejected/repetition": 3,
        "refine/rejected/repetition": 4,
        "refine/rejected/code_block": 1,
        "asked": 9,
    }
    assert rejections_of(metrics) == {"repetition": 7, "code_block": 1}
    assert rejections_of({"rejections": {"duplicate": 2}}) == {"duplicate": 2}


def test_smoothing_is_the_mean_around_each_value():
    """80 values: two on each side. The 10th of 0..79 stays 10, the first is the mean of 0, 1, 2."""
    found = smooth([float(value) for value in range(80)])
    assert found[10] == 10
    assert found[0] == 1
    assert smooth([5.0, 7.0]) == [5.0, 7.0]
