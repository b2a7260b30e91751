"""Content keys: equal for equal bodies, and different for bodies that differ in anything that is not a tensor."""

from torch import nn

from torchlift import checkpoint_policies, fingerprint, remat, vmap


def scaled(factor):
    class Scaled(nn.Module):
        def forward(self, x):
            return x * factor

    return Scaled


def test_digests_tell_apart_classes_of_one_source():
    one, two = scaled(1), scaled(2)
    assert fingerprint.digest(one) != fingerprint.digest(two)
    assert fingerprint.digest(one) == fingerprint.digest(one)
    assert fingerprint.digest(vmap(nn.Linear)) != fingerprint.digest(vmap(nn.Linear, in_axes=1))
    dots = remat(nn.Linear, policy=checkpoint_policies.dots_saveable)
    assert fingerprint.digest(dots) != fingerprint.digest(remat(nn.Linear))
    assert fingerprint.digest(dots) == fingerprint.digest(remat(nn.Linear, policy=checkpoint_policies.dots_saveable))
