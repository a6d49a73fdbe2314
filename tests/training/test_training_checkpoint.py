import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import assert_same_run, damage, losses, start, stopped_at

from gsa.data import PrepareConfig, prepare
from gsa.training import RunError, train
from gsa.training.checkpoint import find_checkpoint, open_checkpoint


@pytest.fixture
def unfinished(make_config):
    """A run with checkpoints 5 and 10 of 12 steps and nothing after, and its config."""
    config = make_config()
    train(config)
    folder = Path(config.out)
    shutil.rmtree(folder / "checkpoints" / "step-00000012")
    for name in ("report.md", "model.safetensors", "config.json"):
        (folder / name).unlink()
    return config


@pytest.fixture
def three_kept(make_config):
    config = make_config(keep_checkpoints=3)
    train(config)
    return config


def checkpoints(config):
    return sorted(path.name for path in (Path(config.out) / "checkpoints").iterdir())


def test_the_newest_are_kept(make_config, three_kept):
    assert checkpoints(three_kept) == ["step-00000005", "step-00000010", "step-00000012"]


@pytest.mark.parametrize("how", ["truncated", "changed", "missing"])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"]
)
def test_damage_is_found(three_kept, name, how, capsys):
    folder = Path(three_kept.out) / "checkpoints"
    damage(folder / "step-00000012" / name, how)
    words = {"truncated": "truncated: ", "changed": "its SHA-256", "missing": "missing"}[how]
    with pytest.raises(RunError, match=f"step-00000012/{name}: .*{words}"):
        open_checkpoint(folder / "step-00000012")
    said = []
    assert find_checkpoint(folder, said.append).step == 10
    assert len(said) == 1 and "ignoring" in said[0] and name in said[0]


def test_a_damaged_newest_checkpoint_costs_its_steps_only(make_config, three_kept, tmp_path):
    folder = Path(three_kept.out)
    whole = tmp_path / "whole"
    shutil.copytree(folder, whole)
    damage(folder / "checkpoints" / "step-00000012" / "model.safetensors", "truncated")
    for name in ("report.md", "model.safetensors"):
        (folder / name).unlink()
    train(three_kept)
    assert_same_run(folder, whole)
    assert open_checkpoint(folder / "checkpoints" / "step-00000012").step == 12


def test_damaged_and_half_written_ones_take_no_good_one_s_place(three_kept):
    folder = Path(three_kept.out)
    (folder / "checkpoints" / "step-00000012").rename(
        folder / "checkpoints/step-00000011.incomplete"
    )
    damage(folder / "checkpoints" / "step-00000010" / "model.safetensors", "changed")
    for name in ("report.md", "model.safetensors"):
        (folder / name).unlink()
    config = replace(three_kept, keep_checkpoints=1)
    assert train(config, objective=stopped_at(2)).step == 7
    assert checkpoints(config) == ["step-00000007", "step-00000010"]
    open_checkpoint(folder / "checkpoints" / "step-00000007")
    train(config)
    assert checkpoints(config) == ["step-00000012"]


def test_all_damaged_does_not_start_over(three_kept):
    folder = Path(three_kept.out)
    for path in (folder / "checkpoints").iterdir():
        damage(path / "optimizer.safetensors", "truncated")
    (folder / "report.md").unlink()
    before = losses(folder)
    with pytest.raises(RunError, match="all 3 checkpoints are damaged"):
        train(three_kept)
    assert losses(folder) == before


def test_half_written_is_passed_over_and_refused_by_name(three_kept, capsys):
    folder = Path(three_kept.out) / "checkpoints"
    (folder / "step-00000012").rename(folder / "step-00000012.incomplete")
    (folder / "step-00000012.incomplete" / "manifest.json").unlink()
    said = []
    assert find_checkpoint(folder, said.append).step == 10
    assert said == [f"ignoring {folder / 'step-00000012.incomplete'}: half written"]
    for name in ("step-00000012.incomplete", "step-00000099"):
        with pytest.raises(RunError, match=r"half written|no such checkpoint folder"):
            train(three_kept, resume=str(folder / name))


def test_a_full_disk_leaves_the_last_good_checkpoint(make_config, tmp_path):
    config = make_config()
    process = start(config, "full disk from step 7")
    _, message = process.communicate()
    assert process.returncode == 1
    assert "step-00000010: the checkpoint could not be saved" in message
    assert "the last good one is" in message and "step-00000005" in message
    assert checkpoints(config) == ["step-00000005"], "and nothing half-written takes up room"
    open_checkpoint(Path(config.out) / "checkpoints" / "step-00000005")
    train(config)  # room again
    whole = make_config(out=str(tmp_path / "whole"))
    train(whole)
    assert_same_run(config.out, whole.out)


def test_a_full_disk_at_the_very_end_costs_nothing(make_config, tmp_path):
    config = make_config()
    train(config)
    folder, whole = Path(config.out), tmp_path / "whole"
    shutil.copytree(folder, whole)
    for name in ("report.md", "model.safetensors"):
        (folder / name).unlink()
    _, message = start(config, room=50_000).communicate()
    assert "the final model could not be saved" in message
    assert not (folder / "model.safetensors").exists() and not (folder / "report.md").exists()
    assert not list(folder.glob(".*incomplete"))
    train(config)
    assert_same_run(folder, whole)


def test_killed_between_checkpoint_and_export_finishes(make_config, unfinished, tmp_path):
    assert train(unfinished).status == "finished"
    whole = make_config(out=str(tmp_path / "whole"))
    train(whole)
    assert_same_run(unfinished.out, whole.out)


def test_shards_and_model_must_agree_on_the_vocabulary(make_config):
    config = make_config(model={"vocab_size": 200, "pad_token_id": None, "eos_token_id": 1})
    with pytest.raises(ValueError, match=r"vocab_size: .*ids below 258.*vocabulary of 200"):
        train(config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize("eos", [258, -1, [0, 258]])
def test_a_token_that_no_text_can_have_ends_none(make_config, eos):
    config = make_config()
    with pytest.raises(ValueError, match="eos_token_id: expected tokens from 0 to 257, got"):
        train(make_config(model={**config.model, "eos_token_id": eos}))
    assert not Path(config.out).exists()


def test_a_larger_vocabulary_than_the_shards_need_is_fine(make_config):
    config = make_config(model={"vocab_size": 320}, steps=3)
    assert train(config).status == "finished"


def test_training_and_validation_need_one_tokenizer(make_config, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "the": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("the")
    prepare(
        PrepareConfig(
            inputs=(str(tmp_path / "text.txt"),),
            out=str(tmp_path / "shards"),
            tokenizer=str(tmp_path / "words"),
        )
    )
    with pytest.raises(ValueError, match=r"validation: .* different tokenizers"):
        train(make_config(validation=str(tmp_path / "shards")))


def test_a_truncated_shard_is_refused_before_anything_is_written(make_config, tmp_path):
    config = make_config()
    shutil.copytree(config.data, tmp_path / "short")
    damage(tmp_path / "short" / "tokens.bin", "truncated")
    with pytest.raises(ValueError, match=r"tokens\.bin: expected \d+ bytes, got \d+: truncated"):
        train(make_config(data=str(tmp_path / "short")))
    assert not Path(config.out).exists()
