"""Soft actor-critic: one agent, three losses, and so three optimizers.

After Haarnoja et al. (2018a, 2018b): two critics, a policy that is a normal distribution squashed by tanh, and a temperature
that is learned so that the policy's entropy stays near −dim(action).  `train` is to a `pslib.tasks.Control` what
`pslib.training.train` is to a supervised task.
"""

from __future__ import annotations

import base64
import copy
import html
import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from . import tasks
from .plotting import COLOURS
from .tasks import Control
from .training import SCHEDULES, History, _mode, _row, step

__all__ = ["Actor", "Agent", "Critics", "clip", "evaluate", "frames", "interquartile", "skeleton", "train"]

# Beyond these a standard deviation is as good as 0 or ∞; those of the original.
LOG_STD = (-20.0, 2.0)
# More copies of an environment than this run in processes of their own.
IN_PROCESS = 4
# Of an episode that is kept to be drawn: one frame in so many, and at most so many.
EVERY, FRAMES = 4, 60


class Actor(nn.Module):
    """A policy: for each observation a normal distribution, squashed by tanh into (−1, 1).

    Args:
        observations, actions: their dimensions.
        width: of the two hidden layers.
    """

    def __init__(self, observations: int, actions: int, width: int):
        super().__init__()
        self.hidden = nn.ModuleList([nn.Linear(observations, width), nn.Linear(width, width)])
        self.head = nn.Linear(width, 2 * actions)

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the standard deviation, each [batch, actions], before the squashing."""
        x = observation
        for layer in self.hidden:
            x = F.relu(layer(x), inplace=True)
        mean, log_std = self.head(x).chunk(2, -1)
        return mean, log_std.clamp(*LOG_STD)

    def sample(self, observation: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """An action and the logarithm of its density.

        Args:
            observation: [batch, observations].
            noise: [batch, actions], standard normal.

        Returns:
            the actions, [batch, actions], and their log-densities, [batch], nats.
        """
        mean, log_std = self(observation)
        u = mean + log_std.exp() * noise
        # log(1 − tanh²u), in a form that does not cancel.
        squash = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return u.tanh(), (-0.5 * noise.square() - log_std - squash).sum(-1) - 0.5 * math.log(2 * math.pi) * noise.shape[-1]


class Critics(nn.Module):
    """Two networks that estimate the value of an action, side by side in tensors with one more dimension.

    Args:
        observations, actions: their dimensions.
        width: of the two hidden layers.
    """

    def __init__(self, observations: int, actions: int, width: int):
        super().__init__()
        sizes = [observations + actions, width, width, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
            # The scale of torch's own linear layers, critic by critic.
            bound = 1 / math.sqrt(inputs)
            self.weights.append(torch.empty(2, inputs, outputs).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, outputs).uniform_(-bound, bound))

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        """Both values, [2, batch]."""
        x = torch.cat([observation, action], -1).expand(2, -1, -1)
        last = len(self.weights) - 1
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if i < last:
                x = F.relu(x, inplace=True)
        return x.squeeze(-1)


class Agent(nn.Module):
    """What is trained: `actor`, `critic` (both critics) and `log_alpha`, the logarithm of the temperature.

    Args:
        observations, actions: their dimensions.
        width: of the hidden layers.
    """

    def __init__(self, observations: int, actions: int, width: int):
        super().__init__()
        self.actor, self.critic = Actor(observations, actions, width), Critics(observations, actions, width)
        self.log_alpha = nn.Parameter(torch.zeros(()))


class Memory:
    """Transitions, one a row, in memory that is allocated once.

    Args:
        capacity: how many fit.
        observations, actions: their dimensions.
        device: where they are kept.
    """

    def __init__(self, capacity: int, observations: int, actions: int, device: str = "cpu"):
        self.widths = (observations, actions, 1, 1, observations)
        self.rows = torch.zeros(capacity, sum(self.widths), device=device)
        self.filled = 0

    def add(self, observation: Tensor, action: Tensor, reward: Tensor, goes_on: Tensor, following: Tensor) -> None:
        """Keep transitions.

        Args:
            observation, following: before and after, [copies, observations].
            action: [copies, actions], from −1 to 1.
            reward: [copies].
            goes_on: [copies], 0 where the state that follows is the end, after which there is no reward.
        """
        rows = torch.cat([observation, action, reward[:, None], goes_on[:, None], following], 1)
        self.rows[self.filled : self.filled + len(rows)] = rows.to(self.rows.device)
        self.filled += len(rows)


class Losses:
    """The three losses of an agent as functions of buffers that are filled before each update.

    Args:
        agent: what is trained.
        batch_size: transitions an update.
        memory: where they come from.
        discount: of future rewards.
    """

    def __init__(self, agent: Agent, batch_size: int, memory: Memory, discount: float):
        self.agent, self.memory, self.discount = agent, memory, discount
        self.slow = copy.deepcopy(agent.critic).requires_grad_(False)
        device = memory.rows.device
        self.batch = torch.empty(batch_size, memory.rows.shape[1], device=device)
        self.observation, self.action, self.reward, self.goes_on, self.following = self.batch.split(memory.widths, 1)
        self.noise = torch.empty(2, batch_size, memory.widths[1], device=device)
        self.entropy = torch.zeros((), device=device)

    def fill(self, index: Tensor, noise: Tensor) -> None:
        """Take the transitions and the noise of the next update."""
        torch.index_select(self.memory.rows, 0, index, out=self.batch)
        self.noise.copy_(noise)

    @torch.no_grad()
    def target(self) -> Tensor:
        """What both critics should say: r + γ·(min Q'(s', a') − α log π(a'|s')), [batch]; r alone where the episode has ended."""
        action, log_density = self.agent.actor.sample(self.following, self.noise[0])
        first, second = self.slow(self.following, action)
        future = torch.minimum(first, second) - self.agent.log_alpha.exp() * log_density
        return torch.addcmul(self.reward[:, 0], self.goes_on[:, 0], future, value=self.discount)

    def critic(self) -> Tensor:
        """Mean squared Bellman error over both critics, return²."""
        return (self.agent.critic(self.observation, self.action) - self.target()).square().mean()

    def actor(self) -> Tensor:
        """Mean of α log π − Q, return; leaves the policy's entropy for the temperature."""
        action, log_density = self.agent.actor.sample(self.observation, self.noise[1])
        first, second = self.agent.critic(self.observation, action)
        self.entropy.copy_(-log_density.detach().mean())
        return (self.agent.log_alpha.detach().exp() * log_density - torch.minimum(first, second)).mean()

    def temperature(self) -> Tensor:
        """log α times what the entropy has too much of over −dim(action), nats (the paper has α in the place of log α)."""
        return self.agent.log_alpha * (self.entropy + self.noise.shape[-1])

    @torch.no_grad()
    def follow(self, average: float) -> None:
        """Move the slow critics towards the critics."""
        torch._foreach_lerp_(list(self.slow.parameters()), list(self.agent.critic.parameters()), average)


class _Gradient:
    """The gradient of a loss of static buffers; on a GPU a CUDA graph that is replayed.

    The graph is captured at the first call and writes to the same `.grad` tensors ever after.  It has not been run on a GPU
    in this edition.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Iterable[nn.Parameter]):
        self.of, self.parameters = loss, list(parameters)
        self.graph: torch.cuda.CUDAGraph | None = None

    def _compute(self) -> Tensor:
        loss = self.of()
        # Not backward: an actor's loss has gradients with respect to the critics too, which nobody asks for.
        for p, gradient in zip(self.parameters, torch.autograd.grad(loss, self.parameters), strict=True):
            p.grad = gradient
        return loss.detach()

    def __call__(self) -> Tensor:
        """The loss; the gradients are in the parameters."""
        if not self.parameters[0].is_cuda:
            return self._compute()
        if self.graph is None:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._compute()
            torch.cuda.current_stream().wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.value = self._compute()
        self.graph.replay()
        return self.value.clone()


class _World:
    """Copies of an environment, each of which starts again in the step in which its episode ends."""

    def __init__(self, task: Control, seeds: Sequence[int]):
        import gymnasium
        from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

        kind = SyncVectorEnv if len(seeds) <= IN_PROCESS else AsyncVectorEnv
        self.copies = kind([partial(gymnasium.make, task.environment)] * len(seeds), autoreset_mode=AutoresetMode.SAME_STEP)
        self.box: Any = self.copies.single_action_space
        self.observation = self._tensor(self.copies.reset(seed=list(seeds))[0])

    @staticmethod
    def _tensor(values: np.ndarray) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32)

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """A transition of each copy, as `Memory.add` wants them; an episode that is only cut off goes on.

        Args:
            action: [copies, actions], from −1 to 1.
        """
        before = self.observation
        after, reward, terminated, truncated, info = self.copies.step(in_box(action, self.box))
        self.observation = self._tensor(after)
        following = self.observation
        if (terminated | truncated).any():
            # The observation that came last in the episode, not the first one of the next.
            following = following.clone()
            for i in np.flatnonzero(terminated | truncated):
                following[i] = self._tensor(info["final_obs"][i])
        return before, action, self._tensor(reward), self._tensor(~terminated), following


def in_box(action: Tensor, box: Any) -> np.ndarray:
    """Actions from [−1, 1] in the environment's own units."""
    return box.low + (action.numpy() + 1) / 2 * (box.high - box.low)


def _pose(environment: Any) -> list[float]:
    """What is needed to draw it: MuJoCo's positions, or the first number of another's state; nothing if it has neither."""
    world = environment.unwrapped
    if hasattr(world, "data"):
        return [round(v, 4) for v in world.data.qpos.tolist()]
    return [round(float(world.state[0]), 4)] if hasattr(world, "state") else []


@torch.no_grad()
def evaluate(task: Control, actor: Actor, seeds: Sequence[int]) -> tuple[float, list[list[float]]]:
    """Let the agent act without exploring.

    Args:
        task: whose environment it acts in.
        actor: the policy; it takes the action in the middle of its distribution.
        seeds: one for each episode.

    Returns:
        the mean of the episodes' sums of rewards, and poses of the first one, one in `EVERY`.
    """
    import gymnasium

    device = next(actor.parameters()).device
    running = {i: gymnasium.make(task.environment) for i in range(len(seeds))}
    observation = {i: environment.reset(seed=seeds[i])[0] for i, environment in running.items()}
    total, poses, moment = 0.0, [_pose(running[0])], 0
    while running:
        now = torch.as_tensor(np.stack([observation[i] for i in running]), dtype=torch.float32, device=device)
        mean, _ = actor(now)
        moment += 1
        for (i, environment), action in zip(list(running.items()), mean.tanh().cpu(), strict=True):
            observation[i], reward, terminated, truncated, _ = environment.step(in_box(action, environment.action_space))
            total += float(reward)
            if i == 0 and moment % EVERY == 0 and len(poses) < FRAMES:
                poses.append(_pose(environment))
            if terminated or truncated:
                running.pop(i).close()
    return total / len(seeds), poses


def _control(task: str | Control) -> Control:
    """The task of that name.

    Raises:
        ValueError: if it is not one of control.
    """
    found = tasks.get(task)
    if not isinstance(found, Control):
        raise ValueError(f"{found.name} is no task of control; train it with pslib.training.train.")
    return found


def _advance(optimizer: Any, loss: Tensor) -> bool:
    """One step; whether it could be taken."""
    try:
        step(optimizer, loss)
    except (AssertionError, ArithmeticError):
        # What DoG says to a loss that is not a number.
        if math.isfinite(loss.item()):
            raise
        return False
    return True


def train(
    task: str | Control,
    optimizer: Callable[[Iterable], torch.optim.Optimizer],
    *,
    seed: int = 0,
    steps: int | None = None,
    device: str = "auto",
    evaluations: int | None = None,
    progress: bool = False,
    schedule: str = "constant",
    temperature: float | None = None,
) -> History:
    """Train a fresh agent and return its history.

    There is one update for each step of the environment after the warm-up.  Everything random comes from the seed; torch's
    global generator is left as it was.

    Args:
        task: a `Control` or the name of one.
        optimizer: makes an optimizer from named parameters; called for both critics, for the actor and for the temperature.
        seed: of the initialisation, the environment, the actions and the batches.
        steps: of the environment (default: the task's).
        device: of agent and memory; "auto" takes a GPU if there is one.
        evaluations: how often the agent is tried without exploring (default: the task's).
        progress: show a progress bar.
        schedule: as in `pslib.training.train`, of all three optimizers.
        temperature: the learning rate of an Adam that takes the temperature from `optimizer`.

    Returns:
        the history: `losses` are those of the critics at every update (return²), `test_loss` their mean since the last look,
        `test_metric` the mean return of `task.episodes` episodes, `model` the `Agent`, and `optimizer` a dict of the three.
        `details` has the course of the temperature and poses of the last look's first episode, for `frames`.

    Raises:
        MissingData: if gymnasium or MuJoCo is not installed.
        ValueError: for a task that is not one of control, an unknown schedule, or steps that end in the warm-up.
    """
    task = _control(task)
    if schedule not in SCHEDULES:
        raise ValueError(f"there is no schedule {schedule!r}; choose one of {', '.join(SCHEDULES)}.")
    task.load()
    steps = task.steps if steps is None else steps
    evaluations = task.evaluations if evaluations is None else evaluations
    if steps <= task.warmup:
        raise ValueError(f"steps must be more than the warm-up, {task.warmup}, not {steps}.")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Drawn on the CPU, so that every device sees the same.
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**31, (task.copies + task.episodes,), generator=generator).tolist()
    world = _World(task, seeds[: task.copies])
    observations, actions = world.observation.shape[1], world.box.shape[0]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        agent = Agent(observations, actions, task.width)
    agent.to(device)
    capacity = task.copies * math.ceil(steps / task.copies)
    updates = capacity - task.warmup // task.copies * task.copies
    memory = Memory(capacity, observations, actions, device)
    losses = Losses(agent, task.batch_size, memory, task.discount)
    parts: dict[str, list[tuple[str, nn.Parameter]]] = {
        "critic": list(agent.critic.named_parameters()), "actor": list(agent.actor.named_parameters()),
        "temperature": [("log_alpha", agent.log_alpha)],
    }
    optimizers: dict[str, torch.optim.Optimizer] = {
        name: optimizer(iter(named)) for name, named in parts.items() if name != "temperature" or temperature is None
    }
    if temperature is not None:
        optimizers["temperature"] = torch.optim.Adam([agent.log_alpha], lr=temperature)
    schedulers = [SCHEDULES[schedule](o, updates) for o in optimizers.values()]
    gradients = {name: _Gradient(getattr(losses, name), [p for _, p in named]) for name, named in parts.items()}
    names = [f"{part}.{block}" for part, o in optimizers.items() for block in getattr(o, "block_names", [])]
    history = History(task.name, seed, task.metric, block_names=names)
    alphas: list[float] = []
    poses: list[list[float]] = []
    of_updates: list[Tensor] = []
    seen, updating, start = 0, 0.0, time.perf_counter()
    for o in optimizers.values():
        _mode(o, "train")
    bar = None
    if progress:
        from tqdm import tqdm

        bar = tqdm(total=capacity, desc=f"{task.name}, seed {seed}", file=sys.stderr)
    looks = iter([round(steps * (i + 1) / evaluations) for i in range(evaluations)])
    look = next(looks)

    def update(index: Tensor, noise: Tensor) -> bool:
        losses.fill(index, noise)
        for name, o in optimizers.items():
            loss = gradients[name]()
            if name == "critic":
                of_updates.append(loss.reshape(1))
            if not _advance(o, loss):
                return False
        losses.follow(task.average)
        for scheduler in schedulers:
            if scheduler is not None:
                scheduler.step()
        return True

    for done in range(task.copies, capacity + 1, task.copies):
        if done <= task.warmup:
            action = 2 * torch.rand(task.copies, actions, generator=generator) - 1
        else:
            noise = torch.randn(task.copies, actions, generator=generator)
            with torch.no_grad():
                action = agent.actor.sample(world.observation.to(device), noise.to(device))[0].cpu()
            if not bool(action.isfinite().all()):
                history.diverged = True
                break
        memory.add(*world.step(action))
        if done > task.warmup:
            tick = time.perf_counter()
            index = torch.randint(memory.filled, (task.copies, task.batch_size), generator=generator).to(device)
            noise = torch.randn(task.copies, 2, task.batch_size, actions, generator=generator).to(device)
            updated = all(update(*drawn) for drawn in zip(index, noise, strict=True))
            finite = math.isfinite(of_updates[-1].item())
            updating += time.perf_counter() - tick
            if not (updated and finite):
                history.diverged = True
                break
        if bar is not None:
            bar.update(task.copies)
        if done >= look:
            look = next(looks, capacity + 1)
            for o in optimizers.values():
                _mode(o, "eval")
            metric, poses = evaluate(task, agent.actor, seeds[task.copies :])
            for o in optimizers.values():
                _mode(o, "train")
            history.steps.append(done)
            history.test_metric.append(metric)
            history.test_loss.append(torch.cat(of_updates[seen:]).mean().item() if len(of_updates) > seen else math.nan)
            seen = len(of_updates)
            alphas.append(agent.log_alpha.exp().item())
            for kept in ("distance", "effective_lr"):
                row = [v for o in optimizers.values() if hasattr(o, kept) for v in _row(getattr(o, kept))]
                if len(row) == len(names) > 0:
                    getattr(history, kept).append(row)
    if bar is not None:
        bar.close()
    world.copies.close()
    for o in optimizers.values():
        _mode(o, "eval")
    history.model, history.optimizer = agent, optimizers  # type: ignore[assignment]  # three optimizers here
    if of_updates:
        history.losses = torch.cat(of_updates).cpu()
    history.diverged |= not (bool(history.losses.isfinite().all()) and all(map(math.isfinite, history.test_metric)))
    history.seconds = time.perf_counter() - start
    history.step_seconds = updating / max(1, len(of_updates))
    history.details = {"states": poses, "temperature": alphas}
    return history


def interquartile(returns: Any, *, resamples: int = 2000, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean of the middle half of the seeds at each point, and a 95 % interval from resampling the seeds (Agarwal et al. 2021).

    Args:
        returns: [seeds, points].
        resamples: how often the seeds are drawn again, with replacement, whole curves at a time.
        seed: of that drawing.

    Returns:
        the interquartile mean and the lower and upper ends of the interval, each [points].
    """
    returns = np.asarray(returns, dtype=float)
    count = len(returns)

    def middle(values: np.ndarray) -> np.ndarray:
        return np.sort(values, axis=-2)[..., count // 4 : count - count // 4, :].mean(-2)

    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    low, high = np.percentile(middle(returns[drawn]), [2.5, 97.5], axis=0)
    return middle(returns), low, high


def skeleton(task: str | Control, states: Sequence[Sequence[float]]) -> list[np.ndarray]:
    """The bodies of an agent in given poses, seen from the side; nothing is rendered.

    Args:
        task: whose environment it is of.
        states: poses, as in `History.details["states"]`.

    Returns:
        for each pose the ends and the radius of each limb, [limbs, 5] with x₀, z₀, x₁, z₁, r in metres.

    Raises:
        MissingData: if gymnasium or MuJoCo is not installed.
    """
    task = _control(task)
    task.load()
    import gymnasium

    environment = gymnasium.make(task.environment)
    world: Any = environment.unwrapped
    environment.close()
    if not hasattr(world, "model"):
        return [np.array([[0.0, 0.0, -math.sin(state[0]), math.cos(state[0]), 0.1]]) for state in states]
    import mujoco

    model, data, poses = world.model, world.data, []
    limbs = np.flatnonzero(np.isin(model.geom_type, [int(mujoco.mjtGeom.mjGEOM_SPHERE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)]))
    for state in states:
        data.qpos[:] = state
        mujoco.mj_kinematics(model, data)
        half = data.geom_xmat[limbs].reshape(-1, 3, 3)[:, :, 2] * model.geom_size[limbs, 1, None]
        ends = [data.geom_xpos[limbs] + sign * half for sign in (-1, 1)]
        poses.append(np.column_stack([ends[0][:, [0, 2]], ends[1][:, [0, 2]], model.geom_size[limbs, 0]]))
    return poses


def _draw(ax: Any, pose: np.ndarray, across: float, colour: str) -> None:
    """Fill the limbs of a pose, moved by `across`."""
    for x0, z0, x1, z1, r in pose:
        turn = math.atan2(z1 - z0, x1 - x0) + np.linspace(math.pi / 2, 5 * math.pi / 2, 32, endpoint=False)
        first = np.arange(32) < 16
        ax.fill(
            across + np.where(first, x0, x1) + r * np.cos(turn), np.where(first, z0, z1) + r * np.sin(turn), facecolor=colour,
            edgecolor="white", linewidth=0.5, zorder=3,
        )


def _centre(pose: np.ndarray) -> float:
    """Where an agent that walks is; a pendulum stays where it hangs."""
    return 0.0 if len(pose) == 1 else float((pose[:, 0] + pose[:, 2]).mean() / 2)


def _ground(ax: Any, poses: Sequence[np.ndarray], left: float, right: float) -> None:
    pendulum = len(poses[0]) == 1
    ax.set(xlim=(left, right), ylim=(-1.25, 1.25) if pendulum else (-0.1, max(p[:, [1, 3]].max() for p in poses) + 0.2))
    ax.set_aspect("equal")
    ax.axis("off")
    if not pendulum:
        ax.axhline(0.0, color=COLOURS["grey"], linewidth=1)


def frames(task: str | Control, states: Sequence[Sequence[float]], ax: Any, *, count: int = 8) -> None:
    """Draw poses side by side, in the order of time, with the time below each.

    Args:
        task: whose environment they are of.
        states: poses, as in `History.details["states"]`.
        ax: where to draw.
        count: how many of them, evenly spread.
    """
    chosen = sorted({round(i) for i in np.linspace(0, len(states) - 1, count)})
    poses, apart = skeleton(task, [states[i] for i in chosen]), 2.4
    if len(poses[0]) > 1:
        apart = 1.1 * max(np.ptp(p[:, [0, 2]]) for p in poses) + 0.3
    _ground(ax, poses, -0.6 * apart, (len(poses) - 0.4) * apart)
    for position, (i, pose) in enumerate(zip(chosen, poses, strict=True)):
        _draw(ax, pose, position * apart - _centre(pose), COLOURS["blue"])
        ax.text(position * apart, ax.get_ylim()[0], f"{i * seconds(task):.2f} s", ha="center", va="top")
        if len(pose) == 1:
            ax.plot(position * apart, 0, "o", color=COLOURS["black"], markersize=3, zorder=4)


def seconds(task: str | Control) -> float:
    """The time between two poses that are kept."""
    import gymnasium

    environment: Any = gymnasium.make(_control(task).environment)
    environment.close()
    return EVERY * environment.unwrapped.dt


def clip(task: str | Control, states: Sequence[Sequence[float]], alt: str, *, name: str) -> str:
    """A moving picture as HTML that needs nothing from outside; it moves once it is opened, and no longer than it is open.

    Args:
        task: whose environment the poses are of.
        states: poses, as in `History.details["states"]`.
        alt: what is seen.
        name: what is said where it is opened.
    """
    poses, images = skeleton(task, states), []
    for pose in poses:
        figure = Figure(figsize=(3, 2.4), dpi=80, facecolor="white")
        figure.set_layout_engine("none")
        ax = figure.add_axes((0, 0, 1, 1))
        at = _centre(pose)
        _ground(ax, poses, at - 1.6, at + 1.6)
        _draw(ax, pose, 0.0, COLOURS["blue"])
        if len(pose) > 1:
            # Marks on the ground, half a metre apart, so that it is seen to move.
            marks = np.arange(math.ceil(2 * at - 3.2), 2 * at + 3.2) / 2
            ax.plot(marks, np.zeros_like(marks), "|", color=COLOURS["black"])
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        images.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).quantize(16, dither=Image.Dither.NONE))
    stored = io.BytesIO()
    images[0].save(stored, "GIF", save_all=True, append_images=images[1:], duration=round(1000 * seconds(task)), loop=0, optimize=True)
    picture = base64.b64encode(stored.getvalue()).decode()
    return (
        f'<details class="pslib-clip"><summary>{html.escape(name)}</summary>'
        f'<img src="data:image/gif;base64,{picture}" alt="{html.escape(alt)}" style="max-width: 100%"></details>'
    )
