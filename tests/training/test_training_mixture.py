"""Runs over several shard folders: whole, stopped and resumed, and refused with other weights."""

from dataclasses import replace
from pathlib import Path

import pytest
from training_runs import assert_same_run, stopped_at

from gsa.data import PrepareConfig, open_rows, prepare, save_byte_tokenizer
from gsa.training import RunError, TrainConfig, train
from gsa.training.comparison import read_runs, setting_rows


@pytest.fixture
def two(make_config, shard_folders, tmp_path):
    """A configuration whose text is that of the tests and a second one, three to one."""
    (tmp_path / "more.txt").write_text("a second source, read a little slower. " * 60)
    prepare(PrepareConfig(inputs=(str(tmp_path / "more.txt"),), out=str(tmp_path / "more")))
    return make_config(data=f"{shard_folders[0]}:0.75,{tmp_path / 'more'}:0.25", steps=9)


def test_a_mixture_trains_and_goes_on_bit_for_bit(two, tmp_path):
    assert train(two).status == "finished"
    stopped = replace(two, out=str(tmp_path / "stopped"))
    assert train(stopped, objective=stopped_at(7)).step < 9
    assert train(stopped).status == "finished"
    assert_same_run(stopped.out, two.out)
    rows = open_rows(two.data, seq_len=64, seed=two.seed)
    report = (Path(two.out) / "report.md").read_text()
    for part, weight in zip(rows.shards.parts, (0.75, 0.25), strict=True):
        epochs = 9 * two.rows * 64 * weight / part.num_tokens
        assert f"{epochs:.2f} of {part.folder}" in report
        assert f"{part.folder}, weight {weight}:\n\n- {part.sources[0]['name']} (" in report
    shown = {row.name: row.values for row in setting_rows(read_runs([two.out]))}
    assert shown["data"] == [two.data]
    assert shown["fingerprint of data"] == [rows.shards.fingerprint[:12]]
    assert "fingerprint of weights" not in shown


def test_other_weights_do_not_resume(two, shard_folders, tmp_path):
    train(two, objective=stopped_at(7))
    same = two.data.replace(":0.75", ":3").replace(":0.25", ":1")
    other = two.data.replace(":0.75", ":0.5")
    with pytest.raises(
        RunError, match=r"data: .* by other weights \(3/4, 1/4 there, 2/3, 1/3 asked\)"
    ):
        train(replace(two, data=other))
    with pytest.raises(RunError, match=r"\(3/4, 1/4 there, one source asked\)"):
        train(replace(two, data=str(shard_folders[0])))
    changed = PrepareConfig(inputs=(str(tmp_path / "more.txt"),), out=str(tmp_path / "changed"))
    (tmp_path / "more.txt").write_text("a source of other words " * 60)
    prepare(changed)
    with pytest.raises(RunError, match=r"data: .* was made with other shards"):
        train(replace(two, data=two.data.replace("more:", "changed:")))
    assert train(replace(two, data=same)).status == "finished", "the same proportions"


def test_sources_of_a_mixture_share_the_validation_s_tokenizer(two, tmp_path):
    save_byte_tokenizer(tmp_path / "tokenizer")
    for path in (tmp_path / "tokenizer").iterdir():
        path.write_text(path.read_text().replace("<|pad|>", "<|rest|>"))
    given = PrepareConfig(
        inputs=(str(tmp_path / "more.txt"),),
        out=str(tmp_path / "other"),
        tokenizer=str(tmp_path / "tokenizer"),
    )
    prepare(given)
    with pytest.raises(ValueError, match=r"validation: .* were made with different tokenizers"):
        train(replace(two, validation=str(tmp_path / "other")))


@pytest.mark.parametrize("name", ["data", "validation"])
def test_a_stream_is_no_training_text(name):
    options = {"data": "shards", "out": "run", name: "hf:allenai/c4/en"}
    with pytest.raises(ValueError) as caught:
        TrainConfig(name="x", **options)
    message = str(caught.value)
    assert message.startswith(f"{name}: hf:allenai/c4/en would be read as a stream while training")
    assert "does not resume exactly" in message
    command = f"gsa data prepare hf:allenai/c4/en --streaming --out shards/{name}"
    assert command in message
