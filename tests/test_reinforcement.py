"""Soft actor-critic: its parts against hand-computed cases, whole runs against each other under seeds, and the pictures."""

import base64
import io
import math
import re
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats
from torch import distributions as D
from torch.nn import functional as F

from pslib import datasets, experiments, reinforcement, tasks
from pslib.contenders import make
from pslib.reinforcement import Actor, Agent, Critics, Losses, Memory, clip, frames, interquartile, skeleton, train

gymnasium = pytest.importorskip("gymnasium")
pytest.importorskip("mujoco")

LOW, HIGH, LENGTHS = -2.0, 4.0, (3, 4)


class Count(gymnasium.Env):
    """Observations are (episode, time); even episodes terminate at time 3, odd ones are cut off at time 4; the reward is the action."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(LOW, HIGH, (1,), np.float32)

    def __init__(self):
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.time = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        self.time += 1
        odd = self.episode % 2
        over = self.time == LENGTHS[odd]
        return np.array([self.episode, float(self.time)]), float(action[0]), over and not odd, over and bool(odd), {}


class Endless(Count):
    """The reward is 1, and every episode is cut off after 7 steps."""

    def step(self, action):
        self.time += 1
        return np.array([self.episode, float(self.time)]), 1.0, False, self.time == 7, {}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    for name, kind in (("PslibCount-v0", Count), ("PslibEndless-v0", Endless)):
        gymnasium.register(name, kind)
    yield
    for name in ("PslibCount-v0", "PslibEndless-v0"):
        del gymnasium.registry[name]


def tiny(environment="Pendulum-v1", **changes):
    settings = dict(environment=environment, steps=60, warmup=40, width=8, batch_size=8, evaluations=1, episodes=1, full={})
    return replace(tasks.get("pendulum-sac"), **{**settings, **changes})


adamw = partial(make, "adamw", lr=1e-3)


def kept_transitions(monkeypatch, task, seed=0):
    """What a run with AdamW puts into its memory, and its history."""
    memories = []

    class Watched(Memory):
        def __init__(self, *args):
            super().__init__(*args)
            memories.append(self)

    monkeypatch.setattr(reinforcement, "Memory", Watched)
    history = train(task, adamw, seed=seed)
    return memories[0], history


def losses(batch=32, observations=3, actions=2, width=16):
    """Losses on a random batch of a fresh agent."""
    torch.manual_seed(0)
    memory = Memory(batch, observations, actions)
    memory.add(torch.randn(batch, observations), torch.rand(batch, actions) * 2 - 1, torch.randn(batch), torch.ones(batch),
               torch.randn(batch, observations))
    made = Losses(Agent(observations, actions, width), batch, memory, 0.9)
    made.fill(torch.arange(batch), torch.randn(2, batch, actions))
    return made


# The parts


def test_density_of_a_squashed_action_is_that_of_torch():
    torch.manual_seed(0)
    actor = Actor(3, 2, 8).double()
    observation, noise = torch.randn(50, 3, dtype=torch.float64), torch.randn(50, 2, dtype=torch.float64)
    mean, log_std = actor(observation)
    action, log_density = actor.sample(observation, noise)
    normal = D.Independent(D.Normal(mean, log_std.exp()), 1)
    squashed = D.TransformedDistribution(normal, [D.TanhTransform(cache_size=1)])
    u = mean + log_std.exp() * noise
    # Rounding in float64: densities of order 1, a dozen operations each.
    torch.testing.assert_close(action, u.tanh(), rtol=0, atol=1e-15)
    torch.testing.assert_close(log_density, squashed.log_prob(squashed.transforms[0](u)), rtol=1e-12, atol=1e-12)


def test_density_stays_finite_where_tanh_is_one():
    actor = Actor(1, 1, 4)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([30.0, 0.0]))
    _, log_density = actor.sample(torch.zeros(1, 1), torch.zeros(1, 1))
    # log N(0) − log(1 − tanh²30) = −log√(2π) + 2·30 − log 4, to rounding in float32 at 60.
    assert log_density.item() == pytest.approx(-0.5 * math.log(2 * math.pi) + 60 - math.log(4), abs=1e-4)


def test_standard_deviation_is_bounded():
    actor = Actor(1, 1, 4)
    with torch.no_grad():
        actor.head.weight.zero_()
        for value, expected in ((100.0, 2.0), (-100.0, -20.0), (0.5, 0.5)):
            actor.head.bias[1] = value
            assert actor(torch.zeros(1, 1))[1].item() == expected


def test_critics_are_two_perceptrons():
    torch.manual_seed(0)
    critics, observation, action = Critics(3, 2, 16), torch.randn(7, 3), torch.randn(7, 2)
    both = critics(observation, action)
    assert both.shape == (2, 7)
    for i in range(2):
        x = torch.cat([observation, action], 1)
        for layer, (weight, bias) in enumerate(zip(critics.weights, critics.biases, strict=True)):
            x = F.linear(x if layer == 0 else x.relu(), weight[i].T, bias[i, 0])
        # The same sums in another order, in float32.
        torch.testing.assert_close(both[i], x[:, 0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(*both)


def test_critics_start_at_the_scale_of_torchs_linear_layers():
    torch.manual_seed(0)
    for weight, inputs in zip(Critics(60, 4, 100).weights, (64, 100, 100), strict=True):
        for one in weight:
            # The largest of 100 or more uniform numbers is within a tenth of the bound but for a chance of 0.9¹⁰⁰ < 3e-5.
            assert 0.9 / math.sqrt(inputs) < one.abs().max() <= 1 / math.sqrt(inputs)


def test_target_by_hand():
    made = losses(batch=2, actions=1)
    made.agent.log_alpha.data.fill_(math.log(0.5))
    made.agent.actor.sample = lambda observation, noise: (torch.zeros(2, 1), torch.tensor([-3.0, -2.0]))
    made.slow = lambda observation, action: torch.tensor([[1.0, 5.0], [2.0, 4.0]])
    made.reward.copy_(torch.tensor([[3.0], [7.0]]))
    made.goes_on.copy_(torch.tensor([[0.0], [1.0]]))
    # 3, as that episode is over; 7 + 0.9·(min(5, 4) + 0.5·2) = 11.5.  Rounding only.
    torch.testing.assert_close(made.target(), torch.tensor([3.0, 11.5]), rtol=1e-6, atol=0)


def test_target_takes_the_following_observation_and_its_own_noise():
    made = losses()
    before = made.target()
    made.observation.add_(1.0)
    made.noise[1].add_(1.0)
    assert torch.equal(made.target(), before)
    made.noise[0].add_(1.0)
    moved = made.target()
    made.following.add_(1.0)
    assert not torch.equal(moved, before) and not torch.equal(made.target(), moved)


def test_critic_loss_by_hand():
    made = losses(batch=2, actions=1)
    made.target = lambda: torch.tensor([1.0, 2.0])
    made.agent.critic.forward = lambda observation, action: torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    assert made.critic().item() == (0 + 4 + 4 + 0) / 4


def test_actor_loss_by_hand():
    made = losses(batch=2, actions=1)
    made.agent.log_alpha.data.fill_(math.log(2.0))
    made.agent.actor.sample = lambda observation, noise: (torch.zeros(2, 1), torch.tensor([1.0, -2.0]))
    made.agent.critic.forward = lambda observation, action: torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    # α log π − min Q: 2 − 1 and −4 − 2; the entropy is 1/2.  Rounding of 2 = exp(log 2).
    assert made.actor().item() == pytest.approx((1 - 6) / 2, rel=1e-6)
    assert made.entropy.item() == 0.5


@pytest.mark.parametrize("entropy", [-5.0, -2.0, 3.0])
def test_temperature_rises_where_entropy_is_below_minus_the_dimension(entropy):
    made = losses(actions=2)
    made.entropy.fill_(entropy)
    reinforcement._Gradient(made.temperature, [made.agent.log_alpha])()
    assert made.agent.log_alpha.grad.item() == entropy + 2
    torch.optim.SGD([made.agent.log_alpha], lr=1.0).step()
    assert np.sign(made.agent.log_alpha.item()) == np.sign(-2 - entropy)


@pytest.mark.parametrize("name", ["critic", "actor"])
def test_one_step_lowers_the_loss_and_touches_nothing_else(name):
    made = losses()
    part, other = (getattr(made.agent, n) for n in (name, "actor" if name == "critic" else "critic"))
    gradient = reinforcement._Gradient(getattr(made, name), part.parameters())
    before = gradient()
    assert all(p.grad is None for p in [*other.parameters(), *made.slow.parameters(), made.agent.log_alpha])
    # So short a step that the loss's curvature does not matter.
    torch.optim.SGD(part.parameters(), lr=1e-3).step()
    after = gradient()
    squares = sum(p.grad.square().sum() for p in part.parameters())
    assert 0.5 * 1e-3 * squares < before - after < 1.5 * 1e-3 * squares


def test_slow_critics_follow():
    made = losses()
    before = [p.clone() for p in made.slow.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(before, made.agent.critic.parameters(), strict=True))
    with torch.no_grad():
        for p in made.agent.critic.parameters():
            p.add_(1.0)
    made.follow(0.25)
    for x, now in zip(before, made.slow.parameters(), strict=True):
        torch.testing.assert_close(now, x + 0.25, rtol=0, atol=1e-6)  # one rounding in float32 at 1


def test_memory_gives_back_what_was_put_in():
    memory = Memory(4, 2, 1)
    for k in range(2):
        memory.add(torch.full((2, 2), 1.0 + k), torch.full((2, 1), 3.0), torch.tensor([4.0, 5.0 + k]), torch.tensor([1.0, 0.0]),
                   torch.full((2, 2), 9.0))
    assert memory.filled == 4
    made = Losses(Agent(2, 1, 4), 2, memory, 0.9)
    made.fill(torch.tensor([3, 0]), torch.ones(2, 2, 1))
    assert made.observation.tolist() == [[2.0, 2.0], [1.0, 1.0]] and made.action.tolist() == [[3.0], [3.0]]
    assert made.reward.tolist() == [[6.0], [4.0]] and made.goes_on.tolist() == [[0.0], [1.0]]
    assert made.following.tolist() == [[9.0, 9.0]] * 2 and bool((made.noise == 1).all())


# The environment


@pytest.mark.parametrize("copies", [1, 3])
def test_no_transition_crosses_the_border_of_an_episode(copies):
    world = reinforcement._World(tiny("PslibCount-v0"), list(range(copies)))
    ended = []
    for _ in range(21):
        before, _, _, goes_on, after = world.step(torch.zeros(copies, 1))
        assert torch.equal(before[:, 0], after[:, 0]) and torch.equal(before[:, 1] + 1, after[:, 1])
        over = torch.tensor([LENGTHS[int(e) % 2] == t for e, t in after])
        # Even episodes terminate; odd ones are only cut off, and what would have come is worth something.
        assert torch.equal(goes_on == 0, over & (after[:, 0] % 2 == 0))
        assert torch.equal(world.observation[over][:, 1], torch.zeros(int(over.sum())))
        ended.append(over)
    # 21 steps are three times an even and an odd episode.
    assert torch.stack(ended).sum(0).tolist() == [6] * copies


def test_actions_are_in_the_environments_box():
    world = reinforcement._World(tiny("PslibCount-v0"), [0, 1, 2])
    action = torch.tensor([[-1.0], [0.0], [1.0]])
    _, kept, reward, _, _ = world.step(action)
    assert reward.tolist() == [LOW, (LOW + HIGH) / 2, HIGH] and torch.equal(kept, action)


def test_warm_up_draws_uniformly(monkeypatch):
    memory, _ = kept_transitions(monkeypatch, tiny("PslibCount-v0", steps=401, warmup=400))
    actions = memory.rows[:400, 2]
    # Of 400 uniform draws the first two moments are within 5 standard errors, the extremes within 5 % of the ends but for a
    # chance of 1e-4.
    assert abs(actions.mean()) < 5 / math.sqrt(3 * 400)
    assert abs(actions.square().mean() - 1 / 3) < 5 * math.sqrt((1 / 5 - 1 / 9) / 400)
    assert -1 <= actions.min() < -0.95 and 0.95 < actions.max() <= 1


def test_the_environment_is_seeded(monkeypatch):
    rows = [kept_transitions(monkeypatch, tiny(), seed)[0].rows for seed in (0, 0, 1)]
    assert torch.equal(rows[0], rows[1])
    first = [r[0, :3] for r in rows]
    assert not torch.equal(first[0], first[2])
    assert not torch.equal(rows[0][:40, 3], rows[2][:40, 3])


def test_return_is_the_undiscounted_sum_of_an_episode():
    history = train(tiny("PslibEndless-v0", episodes=3, evaluations=2), adamw)
    assert history.test_metric == [7.0, 7.0] and history.steps == [30, 60]


def test_policy_of_the_evaluation_is_the_middle_of_its_distribution():
    actor = Actor(2, 1, 4)
    with torch.no_grad():
        actor.head.weight.zero_()
        actor.head.bias.copy_(torch.tensor([math.atanh(0.5), 2.0]))
    total, _ = reinforcement.evaluate(tiny("PslibCount-v0"), actor, [0])
    # Three steps with the action 1/2, which is LOW + 3/4 of the box; rounding in float32.
    assert total == pytest.approx(3 * (LOW + 0.75 * (HIGH - LOW)), rel=1e-6)


# Whole runs


def test_same_seed_same_bits_whatever_the_global_generator():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one = train(tiny(), adamw, seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = train(tiny(), adamw, seed=3), train(tiny(), adamw, seed=4)
    assert torch.equal(one.losses, again.losses) and one.test_metric == again.test_metric
    assert all(torch.equal(x, y) for x, y in zip(one.model.parameters(), again.model.parameters(), strict=True))
    assert not torch.equal(one.losses, other.losses)


def test_looking_does_not_disturb():
    seldom, often = train(tiny(), adamw), train(tiny(), adamw, evaluations=6)
    assert torch.equal(seldom.losses, often.losses)
    assert often.steps == [10, 20, 30, 40, 50, 60] and seldom.test_metric[-1] == often.test_metric[-1]
    # Nothing is learned in the warm-up; then the mean of what came since the last look.
    assert all(map(math.isnan, often.test_loss[:4]))
    assert often.test_loss[4:] == [pytest.approx(part.mean().item(), rel=1e-6) for part in often.losses.split(10)]
    assert len(often.details["temperature"]) == 6


@pytest.mark.parametrize("average", [0.0, 1.0])
def test_slow_critics_follow_at_every_update(monkeypatch, average):
    made = []

    class Watched(Losses):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((self, [p.clone() for p in self.slow.parameters()]))

    monkeypatch.setattr(reinforcement, "Losses", Watched)
    history = train(tiny(average=average), adamw)
    watched, start = made[0]
    expected = start if average == 0 else history.model.critic.parameters()
    assert all(torch.equal(x, y) for x, y in zip(watched.slow.parameters(), expected, strict=True))


def test_copies_side_by_side():
    task = tiny(copies=4, steps=62)
    history = train(task, adamw, evaluations=2)
    # 16 steps of four copies, ten of them in the warm-up, four updates for each of the others.
    assert len(history.losses) == 24 and history.steps == [32, 64]


def test_copies_in_processes_of_their_own_do_the_same(monkeypatch):
    task = tiny(copies=2, steps=46)
    here = train(task, adamw)
    monkeypatch.setattr(reinforcement, "IN_PROCESS", 1)
    assert torch.equal(here.losses, train(task, adamw).losses)


@pytest.mark.parametrize("name, settings", [
    *((name, {}) for name in ("adamw", "prodigy", "dadapt-adam", "schedule-free", "psdasgd-tensor", "psdasgd-model", "ps-sps", "dog")),
    ("psdasgd-tensor", {"travel": 1.5}),
])
def test_every_contender_trains_all_three_parts(name, settings):
    start = train(tiny(steps=41), partial(make, "sgd", lr=0.0)).model.state_dict()
    history = train(tiny(), partial(make, name, **settings), temperature=1e-3)
    assert not history.diverged and len(history.losses) == 20 and bool(history.losses.isfinite().all())
    now = history.model.state_dict()
    for part in ("actor", "critic", "log_alpha"):
        moved = max((now[k] - start[k]).abs().max() for k in start if k.startswith(part))
        # What PS-SPS is told of the actor's loss, that its floor is 0, is false: where the loss is negative it stays.
        assert 0 < moved < math.inf or (name, part) == ("ps-sps", "actor"), part


def test_blocks_are_named_by_part():
    history = train(tiny(), partial(make, "psdasgd-tensor"))
    assert history.block_names[0] == "critic.weights.0" and history.block_names[-1] == "temperature.log_alpha"
    assert sum(name.startswith("actor.hidden") for name in history.block_names) == 4
    assert len(history.distance) == len(history.effective_lr) == 1
    assert [len(row) for row in history.distance] == [len(history.block_names)] == [13]
    model = train(tiny(), partial(make, "psdasgd-model"))
    assert model.block_names == ["critic.model", "actor.model", "temperature.model"]
    assert train(tiny(), adamw).distance == []


def test_the_temperature_can_be_left_to_adam():
    calls = []

    def optimizer(params):
        calls.append([name for name, _ in params])
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)

    history = train(tiny(steps=41), optimizer, temperature=2e-3)
    assert [names[0] for names in calls] == ["weights.0", "hidden.0.weight"]
    # Adam's first step is its rate.
    assert abs(history.model.log_alpha.item()) == pytest.approx(2e-3, rel=1e-3)
    calls.clear()
    train(tiny(steps=41), optimizer)
    assert calls[2] == ["log_alpha"]


def test_the_schedule_is_that_of_all_three():
    history = train(tiny(), adamw, schedule="cosine")
    # The cosine's last value, which is 0 but for rounding.
    assert [o.param_groups[0]["lr"] for o in history.optimizer.values()] == [pytest.approx(0.0, abs=1e-12)] * 3
    assert [o.param_groups[0]["lr"] for o in train(tiny(), adamw).optimizer.values()] == [1e-3] * 3


def test_optimizers_are_told_when_they_are_looked_at(monkeypatch):
    seen = []

    class Moody(torch.optim.SGD):
        def train(self):
            self.mood = "train"

        def eval(self):
            self.mood = "eval"

        def step(self):
            seen.append(("step", self.mood))
            super().step()

    made = []

    def optimizer(params):
        made.append(Moody([p for _, p in params], lr=1e-3))
        return made[-1]

    real = reinforcement.evaluate
    monkeypatch.setattr(
        reinforcement, "evaluate", lambda *args: (seen.extend(("look", o.mood) for o in made), real(*args))[1],
    )
    train(tiny(), optimizer, evaluations=2)
    assert set(seen) == {("step", "train"), ("look", "eval")} and seen.count(("look", "eval")) == 6
    assert {o.mood for o in made} == {"eval"}


@pytest.mark.parametrize("where", ["critic", "actor"])
def test_a_run_that_is_not_finite_ends(where):
    class Still(torch.optim.SGD):
        def step(self):
            pass

    def optimizer(params):
        named = dict(params)
        part = "critic" if "weights.0" in named else "actor" if "head.bias" in named else "temperature"
        return torch.optim.SGD(named.values(), lr=math.inf) if part == where else Still(named.values())

    history = train(tiny(), optimizer)
    # The first update's loss was finite; what it left behind was not: the next loss, or the next action.
    assert history.diverged and len(history.losses) == (2 if where == "critic" else 1)
    assert history.final_metric == -math.inf and not history.steps


@pytest.mark.parametrize("start, beta2", [((0.3, -0.2, 0.7), 0.98), ((1e4, 1e4, -1e4), 0.999), ((0.0, 0.0, 0.0), 0.98)])
def test_a_linear_loss_has_no_distance_to_find(start, beta2):
    x = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer = make("psdasgd-tensor", [("x", x)], betas=(0.0, beta2))
    x.grad = torch.tensor([2.0, -0.5, 1e-3], dtype=torch.float64)
    deltas = [2.0**-8 * (x.detach().square().mean().sqrt().item() or 1.0)]
    for _ in range(60):
        optimizer.step()
        deltas.append(optimizer.distance.item())
    gone = np.cumsum(deltas)
    # The theorem's inequality; equality would be off by rounding, so that a millionth is allowed.
    assert all(deltas[k + 1] >= gone[k - 1] / 2 * (1 - 1e-6) for k in range(1, 60))
    assert deltas[-1] > deltas[0] * ((1 + math.sqrt(3)) / 2) ** 56


def test_losses_have_the_units_they_are_said_to_have():
    def parts(reward_unit):
        made = losses()
        with torch.no_grad():
            made.reward.mul_(reward_unit)
            made.agent.log_alpha.fill_(math.log(0.2 * reward_unit))
            for critics in (made.agent.critic, made.slow):
                for last in (critics.weights[-1], critics.biases[-1]):
                    last.mul_(reward_unit)
        critic, actor = made.critic().item(), made.actor().item()
        temperature = reinforcement._Gradient(made.temperature, [made.agent.log_alpha])
        temperature()
        return critic, actor, made.agent.log_alpha.grad.item()

    one, eight = parts(1.0), parts(8.0)
    # exp(log 8α) is 8α to rounding in float32.
    assert eight[0] == pytest.approx(64 * one[0], rel=1e-5) and eight[1] == pytest.approx(8 * one[1], rel=1e-5)
    assert eight[2] == one[2]


def test_what_train_refuses():
    with pytest.raises(ValueError, match="digits-mlp is no task of control"):
        train("digits-mlp", adamw)
    with pytest.raises(ValueError, match="no schedule 'steep'"):
        train(tiny(), adamw, schedule="steep")
    with pytest.raises(ValueError, match="more than the warm-up, 40, not 40"):
        train(tiny(), adamw, steps=40)


@pytest.mark.parametrize("missing, environment", [("gymnasium", "Pendulum-v1"), ("mujoco", "Hopper-v5")])
def test_missing_packages_are_named(monkeypatch, missing, environment):
    for module in [m for m in sys.modules if m == missing or m.startswith(f"{missing}.") or m.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    datasets.environment.cache_clear()
    try:
        with pytest.raises(datasets.MissingData, match=rf"{environment}.*pip install 'gymnasium\[mujoco\]'\.$") as caught:
            train(tiny(environment), adamw)
        assert "\n" not in str(caught.value)
    finally:
        datasets.environment.cache_clear()


def test_the_floor_of_the_actors_loss_is_minus_the_soft_value():
    generator = torch.Generator().manual_seed(0)
    values, temperature = torch.randn(6, generator=generator, dtype=torch.float64), 0.3
    soft_value = temperature * (values / temperature).logsumexp(0)

    def loss(policy):
        return (policy * (temperature * policy.log() - values)).sum(-1)

    random = torch.distributions.Dirichlet(torch.ones(6, dtype=torch.float64)).sample((1000,))
    assert bool((loss(random) > -soft_value).all())
    # Rounding in float64 of a handful of numbers of order 1.
    torch.testing.assert_close(loss((values / temperature).softmax(0)), -soft_value, rtol=1e-12, atol=0)


def test_ps_sps_stays_where_the_loss_is_negative():
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = make("ps-sps", [("x", x)])
    x.grad = torch.tensor([1.0, -1.0])
    optimizer.step(loss=torch.tensor(-0.5))
    assert x.tolist() == [1.0, 2.0]
    optimizer.step(loss=torch.tensor(0.5))
    assert x.tolist() != [1.0, 2.0]


# What is made of returns


def test_interquartile_mean_by_hand():
    middle, _, _ = interquartile([[30.0, 1], [10, 1], [-1000, 1], [20, 1], [1000, 9]])
    assert middle.tolist() == [20.0, 1.0]
    returns = np.random.default_rng(0).normal(size=(10, 3))
    # The same numbers summed in another order.
    np.testing.assert_allclose(interquartile(returns)[0], stats.trim_mean(returns, 0.25, axis=0), rtol=1e-12)


def test_bootstrap_band_by_hand():
    _, low, high = interquartile([[5.0]] * 5)
    assert low == high == 5
    # Two seeds are drawn twice: 0, ½, ½ or 1, a quarter of the time each.
    _, low, high = interquartile([[0.0], [1.0]])
    assert (low, high) == (0, 1)
    # Drawn as whole curves: what one point has low its mirror image has high.
    x = np.random.default_rng(1).normal(size=9)
    middle, low, high = interquartile(np.stack([x, -x], 1))
    assert low[0] == pytest.approx(-high[1], rel=1e-12) and low[0] < middle[0] < high[0]
    # The mean of five numbers, to rounding.
    np.testing.assert_allclose(middle[0], np.sort(x)[2:7].mean(), rtol=1e-12)


# Pictures


def test_a_pendulum_is_where_its_angle_says():
    poses = skeleton("pendulum-sac", [[0.0], [math.pi / 2], [math.pi]])
    ends = np.array([pose[0, :4] for pose in poses])
    # Up, to the left as gymnasium draws it, down; rounding of π.
    np.testing.assert_allclose(ends, [[0, 0, 0, 1], [0, 0, -1, 0], [0, 0, 0, -1]], atol=1e-15)


def test_a_hopper_stands_and_moves():
    standing = [0.0, 1.25, 0.0, 0.0, 0.0, 0.0]
    moved = [0.7, 1.35, *standing[2:]]
    one, other = skeleton("hopper-sac", [standing, moved])
    assert one.shape == (4, 5)
    # From the model's description: the torso reaches from 1.05 to 1.45 m; the foot, of radius 6 cm, touches the ground.
    np.testing.assert_allclose(sorted(one[0, [1, 3]]), [1.05, 1.45], atol=1e-9)
    np.testing.assert_allclose((one[:, [1, 3]].min(1) - one[:, 4]).min(), 0.04, atol=1e-9)
    np.testing.assert_allclose(other - one, np.tile([0.7, 0.1, 0.7, 0.1, 0.0], (4, 1)), atol=1e-12)


def test_frames_draw_what_they_are_given():
    figure = Figure()
    ax = figure.add_subplot()
    frames("pendulum-sac", [[0.0], [1.0], [math.pi / 2]], ax, count=2)
    upright, left = (patch.get_xy() for patch in ax.patches)
    # A rod of length 1 with round ends of radius 0.1; polygons of 32 corners reach as far to 1 %.
    np.testing.assert_allclose([upright[:, 1].max(), upright[:, 1].min(), np.ptp(upright[:, 0])], [1.1, -0.1, 0.2], atol=2e-3)
    np.testing.assert_allclose([np.ptp(left[:, 0]), np.ptp(left[:, 1])], [1.2, 0.2], atol=2e-3)
    # 0.05 s a step, and every fourth is kept.
    assert [text.get_text() for text in ax.texts] == ["0.00 s", "0.40 s"]


def test_a_runs_last_episode_is_kept_to_be_drawn():
    history = train(tiny(steps=41), adamw)
    states = history.details["states"]
    # 200 steps, every fourth, and the start.
    assert len(states) == 51 and all(len(s) == 1 and round(s[0], 4) == s[0] for s in states)
    generator = torch.Generator().manual_seed(0)
    seed = torch.randint(2**31, (2,), generator=generator)[1].item()
    environment = gymnasium.make("Pendulum-v1")
    environment.reset(seed=seed)
    assert states[0][0] == round(float(environment.unwrapped.state[0]), 4)
    hopper = replace(tiny("Hopper-v5", steps=41), name="hopper")
    assert all(len(s) == 6 for s in train(hopper, adamw).details["states"])
    assert train(tiny("PslibCount-v0"), adamw).details["states"][0] == []


def test_no_more_poses_are_kept_than_can_be_shown(monkeypatch):
    monkeypatch.setattr(reinforcement, "FRAMES", 7)
    _, poses = reinforcement.evaluate(tiny(), Actor(3, 1, 4), [0])
    assert len(poses) == 7


def test_a_clip_has_every_frame_and_its_text():
    states = [[x] for x in np.linspace(0, 3, 5)]
    made = clip("pendulum-sac", states, 'a "rod"', name="Play <it>")
    assert "<summary>Play &lt;it&gt;</summary>" in made and 'alt="a &quot;rod&quot;"' in made
    picture = Image.open(io.BytesIO(base64.b64decode(re.search(r"base64,([^\"]+)", made)[1])))
    assert picture.n_frames == 5 and picture.info["duration"] == 200
    assert len(clip("hopper-sac", [[0.1 * i, 1.25, 0.02 * i, -0.1, 0.1, 0.1] for i in range(60)], "", name="")) < 150_000


# What the records say


def ends(experiment, contender, **settings):
    """The mean of the last three looks of each seed."""
    runs = [
        r for r in experiments.collect(experiment)
        if r.spec.contender == contender and settings.items() <= r.spec.settings.items()
    ]
    assert [r.spec.seed for r in runs] == [0, 1, 2, 3, 4]
    return np.array([r.curve["test_metric"] for r in runs])[:, -3:].mean(1)


def middle(values):
    return interquartile(values[:, None])[0].item()


RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def test_every_estimated_distance_diverges_on_the_temperature():
    diverged = {}
    for r in experiments.collect("temperature-pendulum-sac"):
        diverged.setdefault(r.spec.contender, []).append(r.diverged)
    assert diverged.pop("adamw") == [False] * 5
    assert diverged == {name: [True] * 5 for name in ("psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam")}


def test_on_the_pendulum_the_distance_per_tensor_is_level_with_tuned_adamw():
    ours = ends("breadth-pendulum-sac", "psdasgd-tensor")
    for lr in RATES:
        tuned = ends("breadth-pendulum-sac", "adamw", lr=lr)
        assert middle(ours) > middle(tuned) and ours.min() > tuned.min()


def test_prodigy_learns_the_pendulum_on_two_of_ten_runs_and_dadapt_adam_on_none():
    # An untrained policy gets about -1250, a trained one about -150.
    learned = {
        name: [int((ends(e, name) > -400).sum()) for e in ("breadth-pendulum-sac", "constant-pendulum-sac")]
        for name in ("prodigy", "dadapt-adam")
    }
    assert learned == {"prodigy": [0, 2], "dadapt-adam": [0, 0]}
    assert ends("breadth-pendulum-sac", "psdasgd-tensor").min() > -250


def test_at_a_constant_rate_the_distance_per_tensor_forgets():
    lost = {}
    for schedule, experiment in (("constant", "constant-pendulum-sac"), ("cosine", "breadth-pendulum-sac")):
        runs = [r for r in experiments.collect(experiment) if r.spec.contender == "psdasgd-tensor"]
        returns = np.array([r.curve["test_metric"] for r in runs])
        lost[schedule] = int((returns.max(1) - returns[:, -1] > 300).sum())
        if schedule == "constant":
            assert all(r.distance[-1][r.block_names.index("actor.hidden.0.weight")] > 1 for r in runs)
    assert lost == {"constant": 3, "cosine": 0}


def test_adamw_at_a_constant_rate_is_level_with_the_distance_per_tensor():
    steady = {lr: ends("constant-pendulum-sac", "adamw", lr=lr) for lr in RATES[1:]}
    assert all(middle(values) > middle(ends("breadth-pendulum-sac", "adamw", lr=lr)) for lr, values in steady.items())
    # 30 is a fifth of what a trained pendulum still loses on its way up.
    assert abs(max(map(middle, steady.values())) - middle(ends("breadth-pendulum-sac", "psdasgd-tensor"))) < 30
    assert min(steady[lr].min() for lr in RATES[2:]) > -400


def test_a_short_hopper_tells_nobody_apart():
    names = ("psdasgd-tensor", "psdasgd-model", "prodigy", "dadapt-adam", "schedule-free", "adamw-default")
    values = [ends("breadth-hopper-sac", name) for name in names]
    tuned = max((ends("breadth-hopper-sac", "adamw", lr=lr) for lr in (3e-4, 1e-3, 3e-3)), key=middle)
    assert max(v.min() for v in [*values, tuned]) < min(v.max() for v in [*values, tuned])
