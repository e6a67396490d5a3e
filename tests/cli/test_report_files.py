"""The report of a run: answers and one optimizer step of a tiny model. Curves and page: tests/report."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset

from fastrl.benchmark.memory import MemoryMeter
from fastrl.cli import main
from fastrl.objectives import PolicyObjective
from fastrl.report.answers import Answers, answers_table, generate, load_model
from fastrl.report.step_comparison import SIDES, compare_step, run_side
from fastrl.rollout import SamplingParams
from fastrl.trainers.rollouts import Rollouts


def rollouts(sequences=6, prompt=5, completion=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prompt_mask, mask = torch.ones(sequences, prompt).bool(), torch.ones(sequences, completion).bool()
    prompt_mask[1, :2] = False
    mask[0, 3:] = False
    mask[2, 1:] = False
    return Rollouts(
        torch.randint(4, 34, (sequences, prompt), generator=generator),
        prompt_mask,
        torch.randint(4, 34, (sequences, completion), generator=generator),
        mask,
        torch.tensor([1.0, -0.5, 0.0, 0.0, 0.7, -1.2])[:sequences],
    )


def test_answers_table_keeps_to_one_line_per_prompt():
    before = Answers(["a | b\nc", "x" * 300], [0.5, math.nan])
    after = Answers(["7", ""], [1.0, 0.0])
    prompts = [[{"role": "system", "content": "s"}, {"role": "user", "content": "3 + 4?"}], "plain"]
    lines = answers_table(prompts, before, after).splitlines()
    assert lines[2] == "| 3 + 4? | a \\| b c | 0.5 | 7 | 1 |"
    assert lines[3].startswith("| plain | xxx") and "… | nan |" in lines[3] and len(lines[3]) < 140
    assert lines[-1] == "Mean reward of the greedy answers to 2 prompts: 0.50 before, 0.50 after."


def test_generate_repeats_prompts_and_scores_as_a_trainer_does(model_folder):
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(model_folder), load_model(str(model_folder), "float32", "cpu")
    rows = Dataset.from_list([{"prompt": "a b", "answer": 1}, {"prompt": "c", "answer": 2}])

    def by_answer(completions, answer, **kwargs):
        return [None if expected == 1 else float(expected) for expected in answer]

    made = generate(model, tokenizer, rows, [by_answer], SamplingParams(max_tokens=3), num_generations=2)
    assert [len(ids) for ids in made.prompt_ids] == [2, 2, 1, 1] and len(made.texts) == 4
    assert made.rewards[:2].isnan().all() and made.rewards[2:].flatten().tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"loss_type": "dapo"},
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
        {"loss_type": "dr_grpo", "max_completion_length": 7, "entropy_coef": 0.01},
    ],
    ids=["dapo", "gspo", "dr_grpo with entropy"],
)
def test_sides_agree_on_loss_and_gradients(model_folder, settings):
    objective, results = PolicyObjective(**settings), {}
    for side in SIDES:
        for micro_batch in (None, 2):
            model = load_model(str(model_folder), "float32", "cpu")
            measured = run_side(side, model, rollouts(), objective, temperature=0.7, micro_batch=micro_batch)
            results[side, micro_batch] = measured, {n: p.grad.clone() for n, p in model.named_parameters()}
    measured, gradients = results["eager", None]
    for (side, micro_batch), (other, others) in results.items():
        assert other.loss == pytest.approx(measured.loss, abs=1e-6), (side, micro_batch)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-6, rtol=1e-4, msg=f"{side} {micro_batch} {name}")
    live = 6 if objective.entropy_coef else 4
    assert results["trainer", None][0].sequences == live and results["fused", None][0].sequences == 6


def test_comparison_refuses_what_it_does_not_do(model_folder):
    model = load_model(str(model_folder), "float32", "cpu")
    with pytest.raises(ValueError, match="expected one of eager, fused, trainer, got 'other'"):
        run_side("other", model, rollouts(), PolicyObjective())
    with pytest.raises(ValueError, match="needs a reference model"):
        run_side("eager", model, rollouts(), PolicyObjective(beta=0.1))


def test_a_failing_process_is_an_error_with_its_output(tmp_path):
    with pytest.raises(RuntimeError, match=r"the eager side of the step comparison failed:(.|\n)*nowhere"):
        compare_step(str(tmp_path / "nowhere"), rollouts(), PolicyObjective(), sides=["eager"])


def test_memory_meter_sees_a_passing_allocation():
    meter = MemoryMeter(torch.device("cpu"))
    torch.ones(32 * 2**20).sum()  # 128 MiB
    lap, quiet = meter.lap(), meter.lap()
    if lap is None or quiet is None:
        pytest.skip("this system does not reset the high-water mark of a process")
    assert 120 * 2**20 < lap.peak - lap.start < 200 * 2**20
    assert quiet.peak - quiet.start < 20 * 2**20


def test_whole_report_of_a_run(project, capsys):
    assert main(["grpo", "--config", "run.yaml", "--report", "curves", "answers", "step_comparison"]) == 0
    out = capsys.readouterr().out
    folder = project / "out" / "report"
    names = ("report.html", "curves.png", "curves_reward.png", "answers.md", "answers.json")
    for name in (*names, "step_comparison.md", "step_comparison.json"):
        assert (folder / name).stat().st_size > 0 and str(folder.relative_to(project) / name) in out
    comparison = json.loads((folder / "step_comparison.json").read_text())
    assert set(comparison["sides"]) == set(SIDES)
    assert comparison["sides"]["eager"]["sequences"] == 8
    for difference in comparison["gradient_differences"].values():
        assert difference["largest"] < 1e-5 and difference["relative"] < 1e-4 and difference["largest_entry"] > 0
    answers = (folder / "answers.md").read_text()
    assert "| n o p q r |" in answers and "greedy answers to 8 prompts" in answers
    page = (folder / "report.html").read_text()
    assert "n o p q r" in page and "<svg" in page and "reward: " in out


def test_answers_and_step_of_an_adapter(project):
    pytest.importorskip("peft")
    words = ["--use_peft", "true", "--lora_r", "2", "--lora_dropout", "0.0", "--max_steps", "2", "--report", "answers"]
    assert main(["grpo", "--config", "run.yaml", *words]) == 0
    gradients = {}
    for side in ("eager", "trainer"):
        model = load_model(str(project / "out"), "float32", "cpu")
        run_side(side, model, rollouts(), PolicyObjective())
        gradients[side] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all("lora_" in name for name in gradients["eager"])
    assert max(gradient.abs().max() for gradient in gradients["eager"].values()) > 1e-3
    torch.testing.assert_close(gradients["trainer"], gradients["eager"], atol=1e-6, rtol=1e-4)
