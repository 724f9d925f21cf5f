"""The tokenizer: equal to diffusers' VQModel, files, and bad input."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from knnfast.diffusion.tokenizer import TokenizerConfig, VQTokenizer

SMALL = TokenizerConfig(
    block_out_channels=(8, 16, 16),
    latent_channels=6,
    vq_embed_dim=4,
    num_vq_embeddings=32,
    sample_size=24,
    norm_num_groups=4,
    mid_block_add_attention=False,
)
WITH_ATTENTION = TokenizerConfig(
    block_out_channels=(8, 16),
    layers_per_block=2,
    latent_channels=4,
    num_vq_embeddings=16,
    sample_size=16,
    norm_num_groups=8,
)
# The published VQ-VAE of VQ-Diffusion, in small: attention in the stages of its coarsest grid.
ITHQ = TokenizerConfig(
    block_out_channels=(8, 8, 16),
    layers_per_block=2,
    latent_channels=8,
    vq_embed_dim=8,
    num_vq_embeddings=32,
    sample_size=16,
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
)


def made(config: TokenizerConfig) -> VQTokenizer:
    model = VQTokenizer(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.quantize.embedding.weight)
    return model


@pytest.mark.parametrize("config", [SMALL, WITH_ATTENTION, ITHQ], ids=["plain", "middle", "ithq"])
def test_equals_diffusers(config: TokenizerConfig, tmp_path: Path) -> None:
    """Files written here load in diffusers and the reverse; latents, codes, pixels agree."""
    vq_model = pytest.importorskip("diffusers.models.autoencoders.vq_model")
    ours = made(config)
    ours.save(tmp_path / "ours")
    theirs = vq_model.VQModel.from_pretrained(tmp_path / "ours").eval()
    images = torch.rand(3, 3, config.sample_size, config.sample_size)
    with torch.no_grad():
        latents = theirs.encode(images * 2 - 1).latents
        quantized, _, (_, _, index) = theirs.quantize(latents)
        pixels = theirs.decode(quantized, force_not_quantize=True).sample * 0.5 + 0.5
    torch.testing.assert_close(ours.latents(images), latents, atol=1e-4, rtol=1e-4)
    codes = ours.encode(images)
    assert torch.equal(codes.flatten(), index.flatten())
    torch.testing.assert_close(ours.decode(codes), pixels.clamp(0, 1), atol=1e-4, rtol=1e-4)

    theirs.save_pretrained(tmp_path / "theirs")
    again = VQTokenizer.from_folder(tmp_path / "theirs")
    assert torch.equal(again.decode(codes), ours.decode(codes))


def test_published_files(tmp_path: Path) -> None:
    """microsoft/vq-diffusion-ithq: keys of an early diffusers, a config that lacks newer ones."""
    model = made(ITHQ)
    model.save(tmp_path)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in model.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".{new}.", f".{was}.")
        state[name] = value
    assert "encoder.down_blocks.2.attentions.1.proj_attn.bias" in state
    save_file(state, weights)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"_class_name": "VQModel", "_diffusers_version": "0.7.0.dev0"}
    for name in ("mid_block_add_attention", "norm_type"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.rand(2, 3, 16, 16)
    again = VQTokenizer.from_folder(tmp_path)
    assert torch.equal(again.latents(images), model.latents(images))
    assert torch.equal(again.decode(again.encode(images)), model.decode(model.encode(images)))

    weights.rename(tmp_path / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which is not read"):
        VQTokenizer.from_folder(tmp_path)


def test_sizes_are_configuration() -> None:
    model = made(SMALL)
    assert (model.image_size, model.grid, model.codebook_size) == (24, (6, 6), 32)
    codes = model.encode(torch.rand(2, 3, 24, 24))
    assert codes.shape == (2, 36)
    assert codes.dtype == torch.int64
    images = model.decode(codes)
    assert images.shape == (2, 3, 24, 24)
    assert 0 <= images.min() <= images.max() <= 1


def test_the_size_of_the_pictures_may_be_told(tmp_path: Path) -> None:
    """The weights fit any: a published configuration may hold VQModel's default."""
    model = made(SMALL)
    model.save(tmp_path)
    large = VQTokenizer.from_folder(tmp_path, image_size=40)
    assert (large.image_size, large.grid) == (40, (10, 10))
    codes = large.encode(torch.rand(1, 3, 40, 40))
    assert large.decode(codes).shape == (1, 3, 40, 40)
    large.save(tmp_path / "large")
    assert VQTokenizer.from_folder(tmp_path / "large").image_size == 40
    for bad in (0, -4, 42):
        with pytest.raises(
            ValueError, match=f"image_size must be a positive multiple of 4, got {bad}"
        ):
            VQTokenizer.from_folder(tmp_path, image_size=bad)


def test_half_precision_file(tmp_path: Path) -> None:
    model = made(SMALL)
    model.save(tmp_path, torch.float16)
    codes = torch.randint(32, (2, 36))
    again = VQTokenizer.from_folder(tmp_path).decode(codes)
    torch.testing.assert_close(again, model.decode(codes), atol=5e-3, rtol=0)


def test_rejects(tmp_path: Path) -> None:
    model = made(SMALL)
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 24, 24\]"):
        model.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"codes must be \[B, 36\]"):
        model.decode(torch.zeros(1, 35, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"codes must be in \[0, 32\)"):
        model.decode(torch.full((1, 36), 32))
    with pytest.raises(ValueError, match="not a multiple"):
        VQTokenizer(TokenizerConfig(block_out_channels=(32, 32, 32), sample_size=30))
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for bad, message in [
        ({**config, "norm_type": "spatial"}, "norm_type"),
        ({**config, "down_block_types": ["SkipDownBlock2D"] * 3}, "SkipDownBlock2D"),
        ({**config, "up_block_types": ["UpDecoderBlock2D"]}, "1 stages"),
        ([], "expected a JSON object"),
        ({**config, "block_out_channels": []}, r"config\.json: block_out_channels must not be"),
        ({**config, "norm_num_groups": 0}, r"config\.json: norm_num_groups must be at least 1"),
        ({**config, "norm_num_groups": 5}, r"config\.json: block_out_channels .* multiples of"),
        ({**config, "layers_per_block": 0}, r"config\.json: layers_per_block must be at least 1"),
        ({**config, "vq_embed_dim": 0}, r"config\.json: vq_embed_dim must be at least 1, got 0"),
        ({**config, "num_vq_embeddings": 31}, "another architecture"),
        ({**config, "latent_channels": 2**20}, "another architecture"),
        ({**config, "layers_per_block": 10**9}, "layers_per_block must be at most 1,000, got 1"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            VQTokenizer.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="safetensors"):
        VQTokenizer.from_folder(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        VQTokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        VQTokenizer.from_folder(tmp_path / "nowhere")
