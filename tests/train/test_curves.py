"""The event file: what two readers of TensorBoard find in it after kills."""

import numpy as np
import pytest

from tests.train.kill import curves as accumulated
from train.curves import NAME, Curves


def served(folder):
    """Scalars as TensorBoard's default loader, a server of its own, reads them: tag -> steps."""
    pytest.importorskip("tensorboard_data_server")
    from tensorboard.context import RequestContext
    from tensorboard.data import server_ingester

    ingester = server_ingester.SubprocessServerDataIngester(
        server_binary=server_ingester.get_server_binary(),
        logdir=str(folder),
        reload_interval=1,
        channel_creds_type=__import__("tensorboard.util.grpc_util", fromlist=["x"]).ChannelCredsType.LOCAL,
    )
    ingester.start()
    provider, context = ingester.data_provider, RequestContext()
    found = provider.read_scalars(context, experiment_id="", plugin_name="scalars", downsample=1000)
    return {tag: [point.step for point in points] for run in found.values() for tag, points in run.items()}


def test_points_beyond_a_checkpoint_are_written_once(tmp_path):
    curves = Curves(tmp_path)
    curves.scalars("train", {"total": 0.5, "zero": 0.0}, 10)
    kept = curves.flush()
    curves.scalars("train", {"total": 9.0}, 20)  # never in a checkpoint
    curves.close()
    size = (tmp_path / NAME).stat().st_size
    with open(tmp_path / NAME, "ab") as file:
        file.write(b"torn")
    curves = Curves(tmp_path, kept)
    assert curves.flush() == kept
    curves.scalars("train", {"total": 0.25}, 20)
    assert curves.flush() == size
    curves.recording("speech", np.array([0.0, 2.0, np.nan]), 20)
    curves.close()
    found = accumulated(tmp_path)
    assert found["train/total"] == [(10, 0.5), (20, 0.25)] and found["train/zero"] == [(10, 0.0)]
    assert [step for step, _ in found["speech"]] == [20]
    assert served(tmp_path) == {"train/total": [10, 20], "train/zero": [10]}


@pytest.mark.parametrize("length", [0, 10**9])
def test_a_file_that_is_shorter_than_noted_keeps_its_whole_records(tmp_path, length):
    """After a loss of power the end may be missing, or the user may have removed it all."""
    curves = Curves(tmp_path)
    curves.scalars("train", {"total": 1.0}, 1)
    whole = curves.flush()
    curves.scalars("train", {"total": 2.0}, 2)
    curves.close()
    with open(tmp_path / NAME, "r+b") as file:
        file.truncate(whole + 20)
    curves = Curves(tmp_path, length)
    curves.scalars("train", {"total": 3.0}, 3)
    curves.close()
    assert accumulated(tmp_path)["train/total"] == ([(1, 1.0)] if length else []) + [(3, 3.0)]
