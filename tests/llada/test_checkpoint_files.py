"""A base model's files: round trips, and a message that names what is missing, damaged or unfit."""

import json

import llada_helpers as tiny
import pytest
import torch
from llada_helpers import CONFIG, FILES, GAIN, HEAD, INDEX, make_tensors, refused, same
from safetensors.torch import save_file

import llada.model
from llada.checkpoint import write_file
from llada.model import LLaDA


@pytest.fixture
def folder(tmp_path):
    return tiny.write_base(tmp_path / "base")


# ---- round trips ---------------------------------------------------------------------------------
def test_every_tensor_is_loaded_bit_for_bit_and_frozen(folder):
    last_layer = {file for name, file in tiny.weight_map(folder).items() if ".blocks.1." in name}
    assert last_layer == {*FILES}  # loading must not assume that a layer is in one file
    model = LLaDA.from_pretrained(folder)
    assert same(model.state_dict(), make_tensors()) and model.config == CONFIG
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_one_file_without_an_index_in_either_dtype(tmp_path):
    tensors = {name: t.bfloat16() for name, t in make_tensors().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for dtype in (torch.bfloat16, torch.float32):
        model = LLaDA.from_pretrained(tmp_path, dtype=dtype)
        assert same(model.state_dict(), {name: t.to(dtype) for name, t in tensors.items()})


def test_a_checkpoint_is_saved_without_adapters(folder, tmp_path):
    copy = tmp_path / "copy"
    tiny.with_lora(folder, tiny.make_lora()).save_pretrained(copy, files=3)
    files = {f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)}
    assert {path.name for path in copy.iterdir()} == files | {INDEX, "config.json"}
    size = sum(4 * t.numel() for t in make_tensors().values())
    assert json.loads((copy / INDEX).read_text())["metadata"]["total_size"] == size
    assert tiny.weight_map(copy).keys() == make_tensors().keys()
    again = LLaDA.from_pretrained(copy)
    assert same(again.state_dict(), make_tensors()) and again.config == CONFIG


@pytest.mark.parametrize("room", range(4))
def test_a_folder_that_holds_a_config_is_complete(folder, tmp_path, monkeypatch, room):
    """The disk is full after `room` of two files with tensors, the index and the config."""
    written = []

    def write_while_there_is_room(path, content):
        if len(written) == room:
            raise OSError("no space left on device")
        written.append(path)
        write_file(path, content)

    monkeypatch.setattr(llada.model, "write_file", write_while_there_is_room)
    with pytest.raises(OSError, match="no space"):
        LLaDA.from_pretrained(folder).save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """The disk is full after three bytes."""

    def write_three_bytes(path, content):
        path.write_bytes(b"new")
        raise OSError("no space left on device")

    def save_three_bytes(tensors, path, metadata):
        write_three_bytes(path, tensors)

    monkeypatch.setattr("pathlib.Path.write_text", write_three_bytes)
    monkeypatch.setattr("llada.checkpoint.save_file", save_three_bytes)
    for file in (tmp_path / "a.json", tmp_path / "a.safetensors"):
        file.write_bytes(b"old")
        with pytest.raises(OSError, match="no space"):
            write_file(file, {})
        assert file.read_bytes() == b"old"


# ---- files and tensors that are missing or damaged -----------------------------------------------
@pytest.mark.parametrize("file", ["config.json", INDEX, FILES[1]])
def test_a_missing_file_is_named(folder, file):
    (folder / file).unlink()
    refused(f"{file} is missing", LLaDA.from_pretrained, folder)


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("config.json", '{"d_model": 64, ', "config.json does not hold a JSON object"),
        ("config.json", "3", "config.json does not hold a JSON object"),
        ("config.json", '{"hidden_size": 64}', "is not a LLaDA checkpoint.*d_model"),
        (INDEX, "{}", f"{INDEX} has no usable weight_map"),
        (FILES[0], "{}", f"{FILES[0]} is missing or damaged"),
    ],
)
def test_a_file_with_other_content_is_named(folder, file, content, message):
    (folder / file).write_text(content)
    refused(message, LLaDA.from_pretrained, folder)


def test_a_file_that_was_cut_off_is_named(folder):
    complete = (folder / FILES[1]).read_bytes()
    (folder / FILES[1]).write_bytes(complete[:-9])
    refused(f"{FILES[1]} is missing or damaged", LLaDA.from_pretrained, folder)


def test_a_tensor_that_does_not_belong_to_the_config_is_named(folder):
    complete = tiny.weight_map(folder)
    message = "does not hold the tensors of its config.json.*"
    without = {name: file for name, file in complete.items() if name != GAIN}
    tiny.change_json(folder / INDEX, weight_map=without)
    refused(f"{message}{GAIN}", LLaDA.from_pretrained, folder)
    tiny.change_tensors(folder / FILES[1], {"extra": torch.ones(2)})
    tiny.change_json(folder / INDEX, weight_map=complete | {"extra": FILES[1]})
    refused(f"{message}extra", LLaDA.from_pretrained, folder)
    tiny.change_json(folder / INDEX, weight_map=complete)
    tiny.change_tensors(folder / FILES[1], {HEAD: torch.ones(64, 64)})
    refused(f"{message}{HEAD}", LLaDA.from_pretrained, folder)
    tiny.change_tensors(folder / FILES[1], {HEAD: None})
    refused(f"{FILES[1]} is missing or damaged.*{HEAD}", LLaDA.from_pretrained, folder)


# ---- where a checkpoint lies ---------------------------------------------------------------------
def test_a_hub_id_is_downloaded(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns):
        asked.append(name)
        assert "*.py" in allow_patterns  # transformers needs the code, and `merge` copies it
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    model = LLaDA.from_pretrained("some-one/LLaDA_8B.x")
    assert same(model.state_dict(), make_tensors()) and asked == ["some-one/LLaDA_8B.x"]


def test_a_source_that_leads_nowhere_is_refused(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    for source in (tmp_path / "none", "a/b/c", ""):
        refused("is neither a folder nor a hub id", LLaDA.from_pretrained, source)
    refused("some/one cannot be downloaded: .*--model", LLaDA.from_pretrained, "some/one")
