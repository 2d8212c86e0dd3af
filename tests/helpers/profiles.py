"""Profiles for tests: real ones, small, with every number different."""

from ds_interlock.planning.profile import HeadProfile, LayerProfile, Profile


def layer(number: int, seconds: float = 1.0) -> LayerProfile:
    return LayerProfile(
        name=f"layer {number}",
        forward_seconds=seconds,
        input_gradient_seconds=1.25 * seconds,
        weight_gradient_seconds=0.75 * seconds,
        optimizer_seconds=0.01 * seconds,
        num_parameters=100 + number,
        activation_bytes=1000.0 + number,
        output_bytes=10.0 + number,
    )


def profile(num_layers: int = 8, *, head_seconds: float = 0.5, **changes: object) -> Profile:
    values: dict = {
        "model": "a model",
        "device": "a device",
        "source": "a test",
        "layers": [layer(n, seconds=1.0 + 0.1 * (n % 3)) for n in range(num_layers)],
        "head": HeadProfile(type="linear", seconds=head_seconds, optimizer_seconds=0.02),
        "loss_seconds": 0.125,
        "label_bytes": 4.0,
        "latency_seconds": 0.001,
        "bandwidth_bytes_per_second": 1e6,
        **changes,
    }
    return Profile(**values)
