"""Play a trained agent of any of the scripts: its returns, and a video of its first episode.

    python play.py runs/humanoid-run__mst_sac__1 --episodes 10 --video

Plays `agent.pt`, or the `checkpoint.pt` of a run that trains. A video needs EGL (see MUJOCO_GL).
"""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
import tyro


def main(run_dir: Path, /, episodes: int = 10, seed: int = 1, video: bool = False) -> None:
    """Play a trained agent.

    Args:
        run_dir: folder of the run
        episodes: number of episodes, without noise
        seed: of the episodes
        video: write `video.mp4` into the folder of the run
    """
    run_dir = run_dir.expanduser()
    path = run_dir / "agent.pt" if (run_dir / "agent.pt").exists() else run_dir / "checkpoint.pt"
    if not (path.exists() and (run_dir / "config.json").exists()):
        sys.exit(f"error: {run_dir} has no config.json with agent.pt or checkpoint.pt: name the folder of a run")
    config = json.loads((run_dir / "config.json").read_text())
    if not Path(__file__).with_name(f"{config['script']}.py").exists():
        sys.exit(f"error: {config['script']}.py trained this agent: put a copy of play.py beside it")
    if video:
        os.environ.setdefault("MUJOCO_GL", "egl")
    script, saved = import_module(config["script"]), torch.load(path, map_location="cpu", weights_only=True)
    args = script.Args(**config["args"] | {"cuda": False, "cuda_graphs": False, "compile": False})
    envs = [script.make_env(args, **{"render_mode": "rgb_array"} if video else {}) for _ in range(max(1, episodes))]
    dims = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    agent = script.Agent(args, *dims, torch.device("cpu")).eval()
    agent.load_state_dict(saved["agent"], strict=False)  # agent.pt holds no target networks
    frames, act, dm_control = [], agent.act, hasattr(envs[0].unwrapped, "dmc")

    def act_and_film(obs: np.ndarray) -> np.ndarray:
        if envs[0].get_wrapper_attr("episode_count") == 0:  # not yet at the end of its episode
            film = envs[0].unwrapped.dmc.physics.render(480, 480, camera_id=0) if dm_control else envs[0].render()
            frames.append(film)
        return act(obs)

    agent.act = act_and_film if video else act
    returns = script.evaluate(agent, envs, script.episode_seeds(seed, 2, count=len(envs)))
    print(f"{path}: {returns.mean():.1f} +- {returns.std():.1f}", returns.round(1))
    if video:
        import_module("imageio").mimwrite(run_dir / "video.mp4", frames, fps=30, macro_block_size=2)  # even sizes
        print(f"video: {run_dir / 'video.mp4'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
