"""KNNDiffusion: a prompt becomes an embedding, its neighbours, tokens, an image."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image

from knnfast import _files
from knnfast._calls import Clock, choose_neighbours, scaled
from knnfast._checks import check_flag, check_number, check_range
from knnfast._device import check_torch_device
from knnfast.database import Collection, Database, Item, Neighbour
from knnfast.diffusion.backbone import Backbone
from knnfast.diffusion.denoiser import Denoiser
from knnfast.diffusion.sampler import SamplingGraphs
from knnfast.diffusion.tokenizer import VQTokenizer
from knnfast.diffusion.unet import UNetDenoiser
from knnfast.edit import edit
from knnfast.encoders import Embeddings, Encoder, load_encoder
from knnfast.images import pictures_of
from knnfast.mixture import Mixture
from knnfast.query import Picture, Query, as_queries, embed

FORMAT = "knnfast-model"
BACKBONES: dict[str, type[Backbone]] = {b.backbone: b for b in (Denoiser, UNetDenoiser)}
DTYPES = {
    "discrete": (torch.float32, torch.float16, torch.bfloat16),
    "continuous": (torch.float32,),
}
BUNDLES = Path(__file__).parent / "bundles"
Databases: TypeAlias = Database | Mixture | str | Path | Mapping[str | Path | Database, float]


@dataclass
class Output:
    """What a call of the pipeline returns.

    `images` holds `num_images` pictures per query, query by query; `neighbours` one list per query,
    nearest first; `timings` seconds by phase (encode, search, denoise, decode); `labels` what each
    query is called on a sheet.
    """

    images: list[Image.Image]
    neighbours: list[list[Neighbour]]
    timings: dict[str, float]
    seed: int
    labels: list[str] = field(default_factory=list)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C while images are drawn; `output` holds those of the batches that were finished."""

    def __init__(self, output: Output) -> None:
        super().__init__(f"{len(output.images)} images were finished")
        self.output = output


class KNNDiffusion:
    """Text-to-image by retrieval: a diffusion model conditioned on nearest image embeddings.

    The model is trained on images alone; a prompt enters through the encoder's text tower and the
    images it finds (Sheynin et al. 2022, section 3).

    On CUDA the discrete backbone's sampling is recorded as a CUDA graph when a call's batch, number
    of neighbours, steps and options come a second time, and replayed from then on, with the same
    images; the four last used are kept, with the memory of a run each. Calls with a `callback`,
    edits and the continuous backbone run op by op.

    Args:
        encoder: makes the embeddings of prompts and images; the databases' own.
        tokenizer: turns codes into pixels.
        denoiser: either backbone: predicts the clean codes, or their vectors, from noised ones and
            the condition.
        databases: by name; the first is the default.

    Raises:
        ValueError: parts that do not fit together, or no database.
    """

    def __init__(
        self,
        encoder: Encoder,
        tokenizer: VQTokenizer,
        denoiser: Backbone,
        databases: Mapping[str, Database],
    ) -> None:
        if not databases:
            raise ValueError("databases: at least one is needed, got none")
        for name, database in databases.items():
            if not isinstance(database, Database):
                raise TypeError(f"databases: {name!r} must be a Database, got {database!r}")
        sizes = denoiser.config
        for name, own, part, wanted in (
            ("num_codes", sizes.num_codes, "the tokenizer's", tokenizer.codebook_size),
            ("grid", tuple(sizes.grid), "the tokenizer's", tokenizer.grid),
            ("embed_dim", sizes.embed_dim, "the encoder's", encoder.dim),
        ):
            if own != wanted:
                raise ValueError(f"denoiser: its {name} is {own}, {part} {wanted}")
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.denoiser = denoiser
        self.databases: dict[str, Database] = {}
        for name, database in databases.items():
            database.check_encoder(encoder.card)
            self.databases[name] = database
        self._database: Database | Mixture = next(iter(self.databases.values()))
        self._graphs = SamplingGraphs()

    # ---- loading and saving -----------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        device: str | torch.device = "cpu",
        backbone: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> KNNDiffusion:
        """Load a bundle of the package by name ("stickers"), or a folder by path.

        Every file is compared with the SHA-256 recorded when it was saved, but for those of the
        databases, which may be saved anew where they lie: `Database.open` tells what it checks.

        Args:
            name_or_path: which model.
            device: where its networks run: cpu, cuda or cuda:N.
            backbone: "discrete" or "continuous", of those it holds; None: its first.
            dtype: of the discrete denoiser: float32, float16 or bfloat16 (which pay on a GPU). All
                else, the continuous one too, is float32.

        Raises:
            FileNotFoundError: no such bundle, or a file of it is missing.
            ValueError: a damaged or foreign file, which the message names; a device that is not
                there; another dtype.
        """
        check_torch_device("device", device)
        model = _read_model(name_or_path)
        for file, sha256 in model.sha256:
            _files.check_sha256(file, sha256)
        kind = BACKBONES.get(backbone or next(iter(model.backbones), ""))
        if kind is None or kind.backbone not in model.backbones:
            raise ValueError(
                f"backbone: {name_or_path} holds {', '.join(model.backbones)}, not {backbone!r}"
            )
        check_dtype(dtype, kind.backbone)
        return cls(
            load_encoder(model.encoder, device=device),
            VQTokenizer.from_folder(model.base / "tokenizer", device=device),
            kind.from_folder(model.root / kind.folder, device=device).to(dtype),
            {name: Database.open(folder) for name, folder in model.databases.items()},
        )

    def save_pretrained(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write the pipeline into a new or empty folder that `from_pretrained` reads.

        The current database comes first, as the default, and those that the model has by name. Not
        written are a bundle's other backbone, its judge and its model card, and the weights of an
        open_clip encoder, which is stored by name.

        Args:
            path: the folder.
            dtype: in which the denoiser's weights are stored. Those of `train` and of the bundles
                are FP16 numbers and stay what they are; torch.float32 keeps others.

        Raises:
            ValueError: another dtype than float32, float16 or bfloat16; there is something already;
                the current database is a mix; one's name is a path. OSError: it could not be
                written (a full disk, say); then nothing of it is left.
        """
        check_dtype(dtype, "discrete")
        databases = self._named_databases()
        root = Path(path)
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise ValueError(f"{root}: exists already; give a new or an empty folder")
        with _files.new_folder(root) as part:
            encoder = self.encoder.save(part / "encoder")
            self.tokenizer.save(part / "tokenizer")
            self.denoiser.save(part / self.denoiser.folder, dtype)
            for name, database in databases.items():
                database.save(part / "databases" / name)
            backbones = [self.denoiser.backbone]
            write_manifest(part, encoder or "encoder", list(databases), backbones)

    # ---- devices ----------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the networks run."""
        return next(self.denoiser.parameters()).device

    def to(self, device: str | torch.device) -> KNNDiffusion:
        """Move the networks to a device (cpu, cuda or cuda:N); returns itself.

        Databases are searched where they were: `Database.to` moves one.

        Raises:
            ValueError: a device that is not there. RuntimeError: it has no room for them; they stay
                where they were.
        """
        check_torch_device("device", device)
        before, moved = self.device, []
        try:
            for network in (self.encoder, self.tokenizer, self.denoiser):
                moved.append(network)
                network.to(device)
        except BaseException:
            for network in moved:
                network.to(before)
            raise
        self._graphs = SamplingGraphs()
        return self

    # ---- databases --------------------------------------------------------------------------

    @property
    def database(self) -> Database | Mixture:
        """The database that is searched; assign another one, its name, or a mix to swap it."""
        return self._database

    @database.setter
    def database(self, value: Databases) -> None:
        if value is None:
            raise TypeError(
                "database: expected a Database, a name, a folder or a mapping, got None"
            )
        self._database = self.find_database(value)

    def _named_databases(self) -> dict[str, Database]:
        """All databases by name, the current one first."""
        current = self._database
        if isinstance(current, Mixture):
            raise ValueError(
                "database: a mix is not saved; assign one of its databases, or their "
                "`Database.merge`, first"
            )
        if paths := [name for name in self.databases if not _files.is_plain_name(name)]:
            raise ValueError(f"databases: {paths[0]!r} cannot be the name of a folder in a model")
        own = (name for name, database in self.databases.items() if database is current)
        new = ("database", *(f"database-{n}" for n in range(2, len(self.databases) + 3)))
        name = next(own, None) or next(x for x in new if x not in self.databases)
        return {name: current, **self.databases}

    def find_database(self, value: Databases | None) -> Database | Mixture:
        """The database that a name, a folder or {database: weight} stands for; None: the current.

        Raises:
            ValueError: no such name or folder, or it was made with another encoder.
            FileNotFoundError: a folder that holds no database. TypeError: another type.
        """
        if value is None:
            return self._database
        if isinstance(value, Mapping):
            parts: dict[Database, float] = {}
            for each, weight in value.items():
                database = self.find_database(each)
                if not isinstance(database, Database):
                    raise TypeError(f"database: a mix is of databases, got {database!r} in it")
                check_number("database: a weight", weight)
                parts[database] = parts.get(database, 0.0) + weight
            return Mixture(parts)
        if isinstance(value, str) and value in self.databases:
            return self.databases[value]
        if not isinstance(value, str | Path | Collection):
            raise TypeError(
                f"database: expected a Database, a name, a folder or a mapping, got {value!r}"
            )
        if isinstance(value, str | Path):
            if not Path(value).is_dir():
                raise ValueError(
                    f"database: {str(value)!r} is neither one of {sorted(self.databases)} "
                    "nor a folder"
                )
            value = Database.open(value)
        value.check_encoder(self.encoder.card)
        return value

    # ---- retrieval and generation -----------------------------------------------------------

    def search(
        self,
        prompt: str | Query | Sequence[str | Query] | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        image_weight: float | None = None,
        embedding: np.ndarray | Embeddings | None = None,
        k: int | None = None,
        database: Databases | None = None,
        groups: Sequence[str] | None = None,
        where: Callable[[Item], bool] | None = None,
    ) -> list[list[Neighbour]]:
        """What a call with these arguments would be conditioned on; nothing is drawn.

        Args, Raises: as of a call.
        Returns: one list for each query, nearest first.
        """
        queries = as_queries(prompt, image, image_weight, embedding, self.encoder)
        db = self.find_database(database)
        k, allow = choose_neighbours(db, k, groups, where)
        return db.search(embed(queries, self.encoder), k, allow=allow)

    def __call__(
        self,
        prompt: str | Query | Sequence[str | Query] | None = None,
        *,
        image: Picture | Sequence[Picture] | None = None,
        image_weight: float | None = None,
        embedding: np.ndarray | Embeddings | None = None,
        k: int | None = None,
        steps: int | Sequence[int] = 25,
        guidance: float = 3.0,
        truncation: float = 1.0,
        purity: float | None = None,
        solver: str | None = None,
        num_images: int = 1,
        seed: int | None = None,
        database: Databases | None = None,
        groups: Sequence[str] | None = None,
        where: Callable[[Item], bool] | None = None,
        use_query: bool = True,
        use_neighbours: bool = True,
        batch_size: int = 32,
        callback: Callable[[int, int], None] | None = None,
    ) -> Output:
        """Generate images for prompts, for images, for pairs of both, or for embeddings.

        Args:
            prompt: one text or several; each may be a `query.mix`, or one of `query.between`.
            image: one picture (PIL or a file) or several; beside a prompt, one for each.
            image_weight: share of the image in a query of both, in [0, 1]; None: 0.5.
            embedding: queries as vectors of this pipeline's encoder, [E] or [P, E].
            k: neighbours to condition on, 1 <= k <= size of the database; None: 10, or as many as
                there are.
            steps: number of denoising steps (1 ... T), or descending times from T (discrete).
            guidance: classifier-free guidance weight; 1 means none.
            truncation: keep the most probable classes up to this mass, in (0, 1]; 1 keeps all
                (discrete).
            purity: draw the codes that the network is surest of first, the more sharply the larger
                it is, at least 0; None: any of them (discrete).
            solver: "dpm" or "ddim" (continuous); None: "dpm".
            num_images: samples per query, >= 1.
            seed: 0 ... 2^64 - 1, same seed, same images on one machine with one
                number of threads; None draws one.
            database: which one to search: a name, a folder or a `Database`; a mix as {database:
                weight}, each giving its share of the k neighbours; None: the current one,
                `database`.
            groups: search only these groups of the database.
            where: search only the items for which this is true.
            use_query: condition on the query's embedding.
            use_neighbours: condition on the neighbours' embeddings.
            batch_size: images denoised at once; the random numbers do not depend on it.
            callback: called with (finished, total) network steps.

        Returns:
            Output: images, neighbours, timings, seed.

        Raises:
            ValueError, TypeError: an argument out of its range, which is told before anything is
                computed; words or a picture that the encoder cannot read.
            FileNotFoundError: no such picture, or a folder that holds no database.
            Interrupted: a KeyboardInterrupt when at least one batch was finished.
        """
        queries = as_queries(prompt, image, image_weight, embedding, self.encoder)
        db = self.find_database(database)
        k, allow = choose_neighbours(db, k, groups, where)
        check_range("num_images", num_images, 1, 2**31 - 1)
        check_range("batch_size", batch_size, 1)
        if not (callback is None or callable(callback)):
            raise TypeError(f"callback: expected a function, got {callback!r}")
        check_flag("use_query", use_query)
        check_flag("use_neighbours", use_neighbours)
        check_number("guidance", guidance)
        check_number("truncation", truncation)
        if purity is not None:
            check_number("purity", purity)
        if not (math.isfinite(guidance) and guidance >= 0):
            raise ValueError(f"guidance: must be a finite number of at least 0, got {guidance}")
        options = self._options(truncation, purity, solver)
        self.denoiser.check(steps, guidance, **options)
        if seed is None:
            seed = secrets.randbits(63)
        check_range("seed", seed, 0, 2**64 - 1)
        seed = int(seed)

        timings: dict[str, float] = {}
        clock = Clock(timings, self.device)
        with clock("encode"):
            query = embed(queries, self.encoder)
        with clock("search"):
            neighbours = db.search(query, k, allow=allow)
            cond, mask = self.condition(db, query, neighbours, k, use_query, use_neighbours)
        owner = np.repeat(np.arange(len(query)), num_images)
        index = np.tile(np.arange(num_images), len(query))
        pictures: list[Image.Image] = []
        batches = range(0, len(owner), batch_size)
        draw: Callable[..., torch.Tensor] = self.denoiser.sample
        if callback is None and self._graphs.serves(self.denoiser):
            draw = partial(self._graphs, self.denoiser)
        with finished_part(pictures) as stopped:
            for n, start in enumerate(batches):
                part = slice(start, start + batch_size)
                told = {} if callback is None else {"callback": scaled(callback, n, len(batches))}
                with clock("denoise"):
                    codes = draw(
                        cond[owner[part]],
                        mask[owner[part]],
                        steps=steps,
                        guidance=guidance,
                        seed=seed,
                        image_indices=torch.from_numpy(index[part]).to(self.device),
                        **told,
                        **options,
                    )
                with clock("decode"):
                    # As in the sampler: on the CPU no image sees its batch, even in a rounding.
                    alone = [codes] if self.device.type == "cuda" else codes.split(1)
                    pictures += pictures_of(torch.cat([self.tokenizer.decode(c) for c in alone]))
        labels = [q.label for q in queries]
        output = Output(pictures, neighbours, timings, seed, labels)
        if stopped:
            raise Interrupted(output)
        return output

    edit = edit

    def _options(
        self, truncation: float, purity: float | None, solver: str | None
    ) -> dict[str, Any]:
        """The arguments of `sample` that are the backbone's own."""
        if self.denoiser.backbone == "discrete":
            if solver is not None:
                raise ValueError(f"solver: the discrete backbone has none, got {solver!r}")
            return {"truncation": truncation, "purity": purity}
        if purity is not None:
            raise ValueError(f"purity: the continuous backbone draws no codes, got {purity}")
        if truncation != 1.0:
            raise ValueError(
                f"truncation: the continuous backbone draws from no classes, must be 1, got "
                f"{truncation}"
            )
        return {} if solver is None else {"solver": solver}

    def condition(
        self,
        db: Database | Mixture,
        query: Embeddings,
        neighbours: list[list[Neighbour]],
        k: int,
        use_query: bool = True,
        use_neighbours: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k+1 condition embeddings, [P, k+1, E], and which of them count, [P, k+1]."""
        cond = torch.zeros(len(query), k + 1, self.encoder.dim)
        mask = torch.zeros(len(query), k + 1, dtype=torch.bool)
        cond[:, 0] = torch.from_numpy(query.vectors)
        mask[:, 0] = use_query
        for row, found in enumerate(neighbours):
            ids = [n.item.id for n in found]
            cond[row, 1 : len(ids) + 1] = torch.from_numpy(db.vectors(ids))
            mask[row, 1 : len(ids) + 1] = use_neighbours
        like = next(self.denoiser.parameters())
        return cond.to(like), mask.to(like.device)


@contextmanager
def finished_part(done: Sequence[Any]) -> Iterator[list[KeyboardInterrupt]]:
    """Ends its block on Ctrl-C, which it lends then, where something is done already."""
    stopped: list[KeyboardInterrupt] = []
    try:
        yield stopped
    except KeyboardInterrupt as e:
        if not done:
            raise
        stopped.append(e)


def check_dtype(dtype: torch.dtype, backbone: str) -> None:
    """Refuse what a backbone's weights cannot be."""
    if dtype not in DTYPES[backbone]:
        allowed = ", ".join(map(str, DTYPES[backbone]))
        raise ValueError(
            f"dtype: must be one of {allowed} for the {backbone} backbone, got {dtype!r}"
        )


def find_model(name_or_path: str | Path) -> Path:
    """Folder of a bundle of the package (by name) or of a saved model (by path)."""
    if not isinstance(name_or_path, str | Path):
        raise TypeError(f"name_or_path: expected a name or a folder, got {name_or_path!r}")
    bundled = BUNDLES / str(name_or_path)
    if isinstance(name_or_path, str) and (bundled / "model.json").is_file():
        return bundled
    root = Path(name_or_path)
    if (root / "model.json").is_file():
        return root
    names = sorted(p.parent.name for p in BUNDLES.glob("*/model.json"))
    raise FileNotFoundError(
        f"model {str(name_or_path)!r}: neither a bundle of the package ({', '.join(names)}) "
        "nor a folder with a model.json"
    )


def backbones_of(name_or_path: str | Path) -> list[str]:
    """Names of the backbones that a model holds, its default first."""
    return _read_model(name_or_path).backbones


def databases_of(name_or_path: str | Path) -> list[Path]:
    """Folders of a model's databases, its default first."""
    return list(_read_model(name_or_path).databases.values())


def encoder_of(name_or_path: str | Path, device: str | torch.device = "cpu") -> Encoder:
    """A model's encoder alone."""
    return load_encoder(_read_model(name_or_path).encoder, device=device)


@dataclass(frozen=True)
class _Model:
    """What a model's manifest says; `base` is the folder of all but the denoiser."""

    root: Path
    base: Path
    encoder: str
    databases: dict[str, Path]
    backbones: list[str]
    sha256: list[tuple[Path, str]]


def _read_model(name_or_path: str | Path) -> _Model:
    root = base = find_model(name_or_path).absolute()  # wherever the process goes
    manifest = shared = _files.read_json(root / "model.json", FORMAT)
    try:
        recorded = [(root, manifest)]
        if "base" in manifest:
            base = root.resolve().parent / _files.plain_name(manifest["base"]["folder"])
            shared = _files.read_json(base / "model.json", FORMAT)
            recorded += [(base, shared), (base, manifest["base"])]
        encoder = str(shared["encoder"])
        return _Model(
            root,
            base,
            str(base / encoder) if (base / encoder).is_dir() else encoder,
            {name: base / "databases" / _files.plain_name(name) for name in shared["databases"]},
            [str(name) for name in manifest.get("backbones", ["discrete"])],
            [(at / name, str(value)) for at, x in recorded for name, value in x["sha256"].items()],
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{root / 'model.json'}: incomplete or malformed ({e!r})") from None


def write_manifest(
    root: Path, encoder: str, databases: Sequence[str], backbones: Sequence[str] = ("discrete",)
) -> None:
    """Write `model.json`: what the folder holds, with the SHA-256 of all but its databases."""
    _write_manifest(
        root, {"encoder": encoder, "databases": list(databases), "backbones": list(backbones)}
    )


def write_part_manifest(root: Path, base: Path) -> None:
    """Write the `model.json` of a folder with a denoiser alone, all else in `base` beside it.

    The base's encoder and tokenizer are recorded by their SHA-256: with others it is refused.
    """
    if base.parent.resolve() != root.parent.resolve():
        raise ValueError(f"base: {base} does not lie beside {root}")
    needed = sorted(p for part in ("encoder", "tokenizer") for p in (base / part).glob("*.safe*"))
    sha256 = {p.relative_to(base).as_posix(): _files.sha256_file(p) for p in needed}
    _write_manifest(root, {"base": {"folder": base.name, "sha256": sha256}})


def _write_manifest(root: Path, about: dict[str, Any]) -> None:
    files = sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())
    kept = [p for p in files if p.parts[0] not in ("model.json", "databases")]
    sha256 = {p.as_posix(): _files.sha256_file(root / p) for p in kept}
    _files.write_json(
        root / "model.json", {"format": FORMAT, "version": 1, **about, "sha256": sha256}
    )
