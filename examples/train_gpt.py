"""Train a character-level GPT on the help pages that come with every Python.

    python examples/train_gpt.py                       # layers run by scan_layers
    python examples/train_gpt.py --stack               # layers are one lifted scan
    python examples/train_gpt.py --plain               # the Python loop both are equal to
    python examples/train_gpt.py --remat --policy dots_saveable --layers 24

*What* is trained (`Recipe`) is kept in the checkpoint. *How* its layers are run (`--plain`, `--stack`, `--remat` ...)
changes time and memory, not the arithmetic: a run started one way can be resumed another way, and loss curves agree up
to rounding. Training amplifies rounding: `--dtype float64` shows that they agree, where float32 drifts apart in time.

Shapes in comments: B batch, T time, C width, H heads, V vocabulary, N layers.
"""

from __future__ import annotations

import argparse
import math
import os
import pydoc_data.topics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import torchlift

POLICIES = ("everything_saveable", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable")
COMPILE: dict[str, Any] = {"on": True, "off": False, "aot_eager": {"backend": "aot_eager"}}


def flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": f"{help} ({default})", "type": type(default), **more})


@dataclass(frozen=True)
class Recipe:
    """What is trained, however the layers are run."""

    layers: int = flag(6, "number of blocks")
    width: int = flag(128, "channels of the residual stream")
    heads: int = flag(4, "attention heads")
    context: int = flag(128, "characters the model sees at once")
    batch: int = flag(8, "sequences a step")
    steps: int = flag(1000, "optimizer steps")
    lr: float = flag(3e-3, "peak learning rate")
    dropout: float = flag(0.0, "dropout on both residual branches of a block")
    seed: int = flag(0, "seed of weights, batches and dropout")
    dtype: str = flag("float32", "bfloat16: autocast of float32", choices=["float32", "float64", "bfloat16"])


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        width = recipe.width
        self.heads = recipe.heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, bias=False) for _ in range(2))
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.drop = nn.Dropout(recipe.dropout)
        for linear in (self.qkv, self.up):
            nn.init.normal_(linear.weight, std=0.5 * width**-0.5)
        for linear in (self.proj, self.down):  # 2N of these add up in the residual stream
            nn.init.normal_(linear.weight, std=0.02 / math.sqrt(2 * recipe.layers))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each B H T C/H
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(y.transpose(1, 2).flatten(2))  # B T C

    def forward(self, x: Tensor) -> Any:  # B T C -> B T C
        x = x + self.drop(self.attend(self.norm1(x)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class ScanBlock(Block):
    """The same block as the body of a scan: `carry -> (carry, ys)`, here without ys."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


def build_blocks(recipe: Recipe, args: argparse.Namespace) -> nn.Module:
    """The N blocks, in the way the command line asks for."""
    compile, policy = COMPILE[args.compile], args.policy and getattr(torchlift.checkpoint_policies, args.policy)
    if args.stack:
        body = torchlift.remat(ScanBlock, policy=policy) if args.remat else ScanBlock
        n, rngs = recipe.layers, {"params": True, "dropout": True}
        return torchlift.scan(body, variable_axes={"params": 0}, split_rngs=rngs, length=n, compile=compile)(recipe)
    blocks = [Block(recipe) for _ in range(recipe.layers)]
    if args.plain:
        return nn.Sequential(*blocks)  # a Python loop, with the keys of a ModuleList
    return torchlift.scan_layers(
        blocks, remat=args.remat, policy=policy, every=args.every, lengths=args.lengths, compile=compile
    )


class GPT(nn.Module):
    def __init__(self, recipe: Recipe, vocab: int, args: argparse.Namespace) -> None:
        super().__init__()
        self.autocast = recipe.dtype == "bfloat16"
        self.token = nn.Embedding(vocab, recipe.width)
        self.position = nn.Embedding(recipe.context, recipe.width)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)
        self.blocks = build_blocks(recipe, args)
        self.norm = nn.LayerNorm(recipe.width, bias=False)
        self.head = nn.Linear(recipe.width, vocab, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:  # B T -> B T V
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            x = self.token(tokens) + self.position.weight[: tokens.shape[1]]  # B T C
            x = self.blocks(x)
            x = x[0] if isinstance(x, tuple) else x  # a scan returns (carry, ys)
            logits = self.head(self.norm(x))
        return logits.float() if self.autocast else logits

    def loss(self, tokens: Tensor) -> Tensor:  # B T+1 -> nats a character
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


class Text:
    """The corpus as integers; the last tenth of it is held out."""

    def __init__(self) -> None:
        text = "\n\n".join(pydoc_data.topics.topics.values())
        self.alphabet = sorted(set(text))
        index = {char: i for i, char in enumerate(self.alphabet)}
        data = torch.tensor([index[char] for char in text])
        self.train, self.val = data.split([len(data) - len(data) // 10, len(data) // 10])

    def batch(self, recipe: Recipe, generator: torch.Generator) -> Tensor:  # B T+1
        starts = torch.randint(len(self.train) - recipe.context, (recipe.batch, 1), generator=generator)
        return self.train[starts + torch.arange(recipe.context + 1)]

    def val_batches(self, recipe: Recipe) -> tuple[Tensor, ...]:  # each B T+1
        windows = self.val.unfold(0, recipe.context + 1, recipe.context)
        return windows[: len(windows) // recipe.batch * recipe.batch].split(recipe.batch)


@dataclass
class Run:
    """Everything that changes while training, and so everything a checkpoint holds."""

    recipe: Recipe
    args: argparse.Namespace
    text: Text
    step: int = 0
    losses: list[float] = field(default_factory=list)  # one a step, nats a character
    val: list[tuple[int, float]] = field(default_factory=list)  # (step, nats a character)
    sample: str = ""

    def __post_init__(self) -> None:
        torch.manual_seed(self.recipe.seed)
        self.device = torch.device(self.args.device)
        model = GPT(self.recipe, len(self.text.alphabet), self.args)
        self.model = model.to(self.device, torch.float64 if self.recipe.dtype == "float64" else torch.float32)
        decayed: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, p in model.named_parameters():
            decayed["norm" not in name].append(p)  # by name: a stacked norm weight is N C, and still no matrix
        groups = [{"params": ps, "weight_decay": 0.1 * yes} for yes, ps in decayed.items()]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), fused=True)
        self.batches = torch.Generator().manual_seed(self.recipe.seed)

    def to_plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """With the keys of a ModuleList: a stack has `blocks.w` with N first, for `blocks.0.w` and so on."""
        return torchlift.unstack_state_dict(state, "blocks.") if self.args.stack else state

    def from_plain(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return torchlift.stack_state_dict(state, "blocks.") if self.args.stack else state

    def save(self, path: Path) -> None:
        named, state = dict(self.model.named_parameters()), self.optimizer.state
        moments = {key: {name: state[p][key] for name, p in named.items()} for key in ("exp_avg", "exp_avg_sq")}
        checkpoint = {
            "recipe": asdict(self.recipe),
            "progress": {"step": self.step, "losses": self.losses, "val": self.val},
            "model": self.to_plain(self.model.state_dict()),
            "optimizer": {key: self.to_plain(moment) for key, moment in moments.items()},
            "rng": (self.batches.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()),
        }
        torch.save(checkpoint, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)  # an interrupted save leaves the old one whole

    def load(self, checkpoint: dict[str, Any]) -> None:
        vars(self).update(checkpoint["progress"])
        self.model.load_state_dict(self.from_plain(checkpoint["model"]))
        moments = {key: self.from_plain(moment) for key, moment in checkpoint["optimizer"].items()}
        for name, p in self.model.named_parameters():
            state = {key: moment[name].to(p, copy=True) for key, moment in moments.items()}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.step), device=p.device), **state}
        batches, cpu, cuda = checkpoint["rng"]
        self.batches.set_state(batches)
        torch.set_rng_state(cpu)
        torch.cuda.set_rng_state_all(cuda)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a twentieth of the peak."""
    warmup = max(1, recipe.steps // 20)
    progress = max(0, step - warmup) / max(1, recipe.steps - warmup)
    return recipe.lr * min((step + 1) / warmup, 0.525 + 0.475 * math.cos(math.pi * progress))


def train_step(run: Run) -> float:
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(run.recipe, run.step)
    loss = run.model.loss(run.text.batch(run.recipe, run.batches).to(run.device))
    run.optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.step += 1
    return loss.item()


@torch.no_grad()
def evaluate(run: Run) -> float:
    run.model.eval()
    losses = [run.model.loss(b.to(run.device)).item() for b in run.text.val_batches(run.recipe)]
    run.model.train()
    return sum(losses) / len(losses)


@torch.no_grad()
def generate(run: Run, length: int) -> str:
    """Sample text, not compiled: its length grows with every step."""
    generator = torch.Generator(run.device).manual_seed(run.recipe.seed)
    tokens = run.text.val[None, :1].to(run.device)  # B=1 T
    run.model.eval()
    with torch.compiler.set_stance("force_eager"):
        for _ in range(length):
            logits = run.model(tokens[:, -run.recipe.context :])[:, -1]  # B V
            tokens = torch.cat([tokens, torch.multinomial((logits / 0.8).softmax(-1), 1, generator=generator)], 1)
    run.model.train()
    return "".join(run.text.alphabet[i] for i in tokens[0].tolist())


def peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB"
    if sys.platform == "win32":
        return "unknown memory"
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20:.0f} MiB"


def progress_bar(run: Run) -> Callable[[], None]:
    """A function to call after every step: redraws its line on a terminal, prints twenty elsewhere."""
    start, first, last, terminal = time.perf_counter(), run.step, run.recipe.steps, sys.stderr.isatty()

    def draw() -> None:
        if terminal or run.step % max(1, last // 20) == 0 or run.step == last:
            tokens = (run.step - first) * run.recipe.batch * run.recipe.context
            speed = f"{tokens / (time.perf_counter() - start):,.0f} tokens/s  {peak_memory(run.device)}"
            val = f"  val {run.val[-1][1]:.3f}" if run.val else ""
            line = f"[{'=' * (24 * run.step // last):24}] {run.step}/{last}  loss {run.losses[-1]:.3f}{val}  {speed}"
            print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)

    return draw


def plot(run: Run, path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path.name} not drawn: matplotlib is missing (pip install matplotlib)")
        return
    axes = (figure := Figure(figsize=(7, 4))).subplots()
    axes.plot(range(1, len(run.losses) + 1), run.losses, linewidth=0.7, label="train")
    axes.plot(*zip(*run.val, strict=True), "o-", label="validation")
    axes.set(xlabel="step", ylabel="nats a character")
    axes.legend()
    figure.savefig(path, dpi=120)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_argument_group("what is trained (with --resume: as in the checkpoint)").add_argument
    for f in fields(Recipe):
        what(f"--{f.name}", **f.metadata)
    how = parser.add_argument_group("how the layers are run (by scan_layers, if nothing is said)").add_argument
    how("--plain", action="store_true", help="by a Python loop, nothing lifted")
    how("--stack", action="store_true", help="by a lifted scan over stacked parameters")
    how("--remat", action="store_true", help="recompute the blocks in backward")
    how("--policy", choices=POLICIES, help="what --remat keeps all the same")
    how("--every", type=int, default=1, help="blocks in a rematerialised segment (1)")
    how("--lengths", type=int, nargs="+", help="nested segments: 4 6 for 24 layers")
    how("--compile", choices=COMPILE, default="on")
    how("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run = parser.add_argument_group("the run")
    run.add_argument("--out", type=Path, default=Path("runs/gpt"), help="folder for checkpoint and plot")
    run.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    run.add_argument("--stop", type=int, help="save and leave after this step; --resume goes on")
    run.add_argument("--sample", type=int, default=400, help="characters to write at the end (400)")
    args = parser.parse_args(argv)
    segmented = args.every != 1 or args.lengths
    if (args.plain and (args.stack or args.remat)) or (segmented and (args.plain or args.stack)):
        parser.error("--plain goes without --stack, --remat, --every, --lengths; --stack without the last two")
    return args


def start(args: argparse.Namespace) -> Run:
    """A new run, or the one that the checkpoint holds."""
    given = {f.name: getattr(args, f.name) for f in fields(Recipe) if getattr(args, f.name) is not None}
    if not args.resume:
        return Run(Recipe(**given), args, Text())
    checkpoint = torch.load(args.out / "checkpoint.pt", map_location="cpu")
    for name, value in given.items():
        if value != (kept := checkpoint["recipe"][name]):
            sys.exit(f"--{name} {value}: the run to resume has {kept}, and what is trained stays as it was")
    run = Run(Recipe(**checkpoint["recipe"]), args, Text())
    run.load(checkpoint)
    return run


def main(argv: Sequence[str] | None = None) -> Run:
    run = start(args := parse(argv))
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint, last = args.out / "checkpoint.pt", run.recipe.steps
    draw, every = progress_bar(run), max(1, last // 5)
    while run.step < min(last, args.stop or last):
        run.losses.append(train_step(run))
        if run.step % every == 0 or run.step == last:
            run.val.append((run.step, evaluate(run)))
            run.save(checkpoint)
        draw()
    run.save(checkpoint)
    if run.step == last:
        run.sample = generate(run, args.sample)
        plot(run, args.out / "loss.png")
        print(f"\n{run.sample}\n\nvalidation {run.val[-1][1]:.3f} nats a character; see {args.out}")
    return run


if __name__ == "__main__":
    main()
