"""CLIPs of transformers, open_clip and OpenAI, scaled down, with random weights: ours gives the same numbers.

Each source is asked where it is installed. What they save is loaded with nothing said but the path.
"""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from dalle2_fast import CLIP
from dalle2_fast.checkpoints.formats.clip_options import SIXTEEN_HEADS, from_open_clip
from dalle2_fast.models.clip.model import OPENAI_MEAN, OPENAI_STD
from tests.support.clip_cases import NAMED

TOKENS = 60  # the last two are begin and end
TEXT = torch.tensor([
    [58, 5, 7, 9, 59, 0, 0, 0], [58, 0, 0, 3, 0, 59, 0, 0], [58, 59, 0, 0, 0, 0, 0, 0],
    [58, 4, 59, 59, 59, 59, 59, 59],  # padded as Hugging Face's tokenizer pads
])  # fmt: skip
LENGTHS = [5, 6, 2, 3]


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter and every running statistic away from its initial value, which may be 0 or 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                value.add_(torch.rand_like(value))
            elif value.is_floating_point() and not name.endswith("attn_mask"):
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def pictures(size: int, mean=OPENAI_MEAN, std=OPENAI_STD) -> tuple[torch.Tensor, torch.Tensor]:
    """(images in [0, 1], the same as the sources want them)."""
    images = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return images, (images - mean) / std


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


# ----------------------------------------------------------------------------------------------- transformers

HEADS = {"64 wide": (128, 2), "80, as in H/14": (160, 2), "104, as in bigG/14": (208, 2), "8": (40, 5)}


def hugging_face(vision=(40, 5), act: str = "quick_gelu", end: int = 59, patch: int = 8):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    width, heads = vision
    text = dict(vocab_size=TOKENS, hidden_size=32, intermediate_size=72, num_hidden_layers=2, hidden_act=act,
                num_attention_heads=2, max_position_embeddings=8, eos_token_id=end, projection_dim=24)
    vision = dict(hidden_size=width, intermediate_size=100, num_hidden_layers=3, num_attention_heads=heads,
                  image_size=2 * patch, patch_size=patch, hidden_act=act, projection_dim=24)
    torch.manual_seed(0)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    return shaken(transformers.CLIPModel(config))


@torch.no_grad()
def assert_equals_hugging_face(ours: CLIP, theirs, mean=OPENAI_MEAN, std=OPENAI_STD) -> None:
    images, normalised = pictures(ours.image_size, mean, std)
    expected = theirs.get_image_features(normalised).pooler_output
    assert_equal(ours.encode_image(images, normalize=False), expected)
    embed, encodings, mask = ours.encode_text(TEXT, normalize=False)
    output = theirs.get_text_features(TEXT)
    assert mask.sum(1).tolist() == LENGTHS
    assert_equal(embed, output.pooler_output)
    assert_equal(encodings[mask], output.last_hidden_state[mask])
    logits = theirs(TEXT, normalised).logits_per_image
    assert_equal(ours(TEXT, images, return_loss=False), logits)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("heads", HEADS)
def test_hugging_face(tmp_path, heads, act):
    """A wrong head width, activation, order of q, k, v, or a projection that was not transposed."""
    theirs = hugging_face(HEADS[heads], act)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert not ours.training and ours.config["quick_gelu"] == (act == "quick_gelu")
    assert_equals_hugging_face(ours, theirs)
    # and back: transformers loads what we export, bit for bit
    exported = ours.to_state_dict("huggingface")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in theirs.state_dict().items())


def test_hugging_face_shards_and_old_end_of_text(tmp_path):
    """eos_token_id=2 is what old configurations say; transformers then takes the largest id."""
    theirs = hugging_face(end=2)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_equals_hugging_face(CLIP.from_pretrained(tmp_path), theirs)


def test_hugging_face_statistics_of_the_images(tmp_path):
    """Many of LAION's image towers want another mean and standard deviation, told by a file of its own."""
    theirs = hugging_face()
    theirs.save_pretrained(tmp_path)
    statistics = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(statistics))
    ours = CLIP.from_pretrained(tmp_path)
    assert_equals_hugging_face(ours, theirs, *statistics.values())


def test_towers_alone_and_a_pipeline(tmp_path):
    """The text_encoder/ and image_encoder/ of a diffusers pipeline: one, the other, both."""
    whole = hugging_face()
    import transformers

    text = transformers.CLIPTextModelWithProjection(whole.config.text_config)
    image = transformers.CLIPVisionModelWithProjection(whole.config.vision_config)
    for tower in (text, image):
        tower.load_state_dict({name: whole.state_dict()[name] for name in tower.state_dict()})
    images, normalised = pictures(16)
    with torch.no_grad():
        expected = whole.get_text_features(TEXT).pooler_output
        text.save_pretrained(tmp_path / "text_encoder")
        for path in (tmp_path / "text_encoder", tmp_path):
            ours = CLIP.from_pretrained(path)
            assert_equal(ours.encode_text(TEXT, normalize=False)[0], expected)
            with pytest.raises(ValueError, match="images: expected a CLIP with an image tower"):
                ours.encode_image(images)
        image.save_pretrained(tmp_path / "image_encoder")
        ours = CLIP.from_pretrained(tmp_path / "image_encoder")
        theirs = whole.get_image_features(normalised).pooler_output
        assert_equal(ours.encode_image(images, normalize=False), theirs)
        with pytest.raises(ValueError, match="text: expected a CLIP with a text tower"):
            ours.encode_text(TEXT)
        both = CLIP.from_pretrained(tmp_path)
        assert_equal(both.encode_text(TEXT, normalize=False)[0], expected)
        assert_equal(both.encode_image(images, normalize=False), theirs)


# -------------------------------------------------------------------------------------------------- open_clip

VIT = dict(image_size=24, patch_size=8, layers=2)
RESNET = dict(image_size=64, patch_size=None, layers=[1, 2, 1, 1], width=16)
OPEN_CLIP = {  # vision_cfg, text heads of 16
    "ViT": VIT | dict(width=128),
    "ViT, 80 a head": VIT | dict(width=160, head_width=80),
    "ViT, 104 a head, as wide an MLP as bigG/14": VIT | dict(width=208, head_width=104, mlp_ratio=4.9231),
    "ResNet": RESNET,
    "ResNet, wider heads": RESNET | dict(head_width=128),
}


def open_clip_config(vision: dict, quick_gelu: bool) -> dict:
    text = dict(context_length=8, vocab_size=TOKENS, width=64, heads=4, layers=2)
    return dict(embed_dim=24, quick_gelu=quick_gelu, vision_cfg=vision, text_cfg=text)


def open_clip_model(config: dict, custom_text: bool = False):
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    torch.manual_seed(0)
    kind = open_clip.model.CustomTextCLIP if custom_text else open_clip.model.CLIP
    return shaken(kind(config["embed_dim"], config["vision_cfg"], config["text_cfg"], config["quick_gelu"]))


@torch.no_grad()
def assert_equals_open_clip(ours: CLIP, theirs, mean=OPENAI_MEAN, std=OPENAI_STD) -> None:
    images, normalised = pictures(ours.image_size, mean, std)
    assert_equal(ours.encode_image(images, normalize=False), theirs.encode_image(normalised))
    embed, encodings, mask = ours.encode_text(TEXT, normalize=False)
    assert_equal(embed, theirs.encode_text(TEXT))
    if hasattr(theirs, "ln_final"):
        hidden = theirs.token_embedding(TEXT) + theirs.positional_embedding
        hidden = theirs.ln_final(theirs.transformer(hidden, attn_mask=theirs.attn_mask))
        assert_equal(encodings[mask], hidden[mask])


@pytest.mark.parametrize("quick_gelu", [True, False])
@pytest.mark.parametrize("vision", OPEN_CLIP)
def test_open_clip(tmp_path, vision, quick_gelu):
    config = open_clip_config(OPEN_CLIP[vision], quick_gelu)
    theirs = open_clip_model(config)
    torch.save(theirs.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess})
    (tmp_path / "open_clip_config.json").write_text(text)
    ours = CLIP.from_pretrained(tmp_path)
    assert_equals_open_clip(ours, theirs, preprocess["mean"], preprocess["std"])
    exported = ours.to_state_dict("open_clip")
    assert exported.keys() == theirs.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("custom_text", [False, True])
def test_a_checkpoint_of_open_clip_s_training(tmp_path, custom_text):
    """{"epoch", "state_dict", ...} with "module." before every name, and no configuration anywhere."""
    theirs = open_clip_model(open_clip_config(OPEN_CLIP["ViT"], False), custom_text)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    ours = CLIP.from_pretrained(tmp_path / "epoch_3.pt", quick_gelu=False, text_heads=4)
    assert_equals_open_clip(ours, theirs)


def test_configurations_of_open_clip():
    """All theirs that ours cannot be are refused, by what is foreign; the others are read. Of six,
    names and shapes are equal, and the number of heads follows from the width as we guess it."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip is not installed")
    plain = {}
    for file in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        config = json.loads(file.read_text())
        try:
            plain[file.stem] = config, from_open_clip(config, file.name)
        except ValueError as error:
            foreign = ("timm_", "hf_model", "bias", "CLIPA", "coca", "ls_init")
            assert any(word in str(error) for word in foreign), error
    assert len(plain) > 30 and NAMED.keys() <= plain.keys()
    for name in ("ViT-B-32", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "RN50", "RN50x16"):
        config, options = plain[name]
        with torch.device("meta"):
            theirs = open_clip.model.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
            state = CLIP(**options).state_dict()
        shapes = {key: value.shape for key, value in theirs.state_dict().items()}
        assert {key: value.shape for key, value in state.items()} == shapes, name
    for name, (_, options) in plain.items():
        width = options["dim_image"]
        if options.get("visual_kind") != "resnet" and width % 64 == 0:
            assert options["visual_heads"] == (16 if width in SIXTEEN_HEADS else width // 64), name


# ----------------------------------------------------------------------------------------------------- OpenAI


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and tracing speaks of every shape
@pytest.mark.parametrize("vision", ["ViT", "ResNet"])
def test_openai_s_own_class_in_an_archive(tmp_path, vision):
    """Their CLIP, traced and saved as they publish it: half precision, sizes as buffers, with its code."""
    found = importlib.util.find_spec("clip")
    if found is None:
        pytest.skip("OpenAI's clip is not installed")
    # Its package asks for pkg_resources, which newer setuptools do not have; the model's file does not.
    place = importlib.util.spec_from_file_location("openai_clip", Path(found.origin).with_name("model.py"))
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    torch.manual_seed(0)
    layers, width, size, patch = ((1, 1, 2, 1), 16, 64, None) if vision == "ResNet" else (2, 128, 24, 8)
    theirs = shaken(module.CLIP(24, size, layers, width, patch, 8, TOKENS, 64, 1, 2)).half().float()
    for name, value in (("input_resolution", size), ("context_length", 8), ("vocab_size", TOKENS)):
        theirs.__dict__.pop(name, None)
        theirs.register_buffer(name, torch.tensor(value))
    images, normalised = pictures(size)
    with torch.no_grad():
        archive = torch.jit.trace(theirs, (normalised, TEXT[:3]), check_trace=False)
        theirs = copy.deepcopy(theirs)  # the archive shares its weights
        archive.half().save(tmp_path / "model.pt")
        ours = CLIP.from_pretrained(tmp_path / "model.pt")
        assert_equal(ours.encode_image(images, normalize=False), theirs.encode_image(normalised))
        assert_equal(ours.encode_text(TEXT, normalize=False)[0], theirs.encode_text(TEXT))
        assert_equal(ours(TEXT[:3], images, return_loss=False), theirs(normalised, TEXT[:3])[0])
    assert ours.config["quick_gelu"] and ours.config["visual_kind"] == ("resnet" if patch is None else "vit")
