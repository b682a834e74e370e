import torch

from keyhole.core.keys import new_key
from keyhole.solve import views


def test_a_flat_image_has_flat_copies_and_gradients_flow():
    flat = torch.full((3, 1, 8, 8), 0.3, requires_grad=True)
    seen = views.transformed(flat, new_key(0))
    torch.testing.assert_close(seen, flat)
    seen.sum().backward()
    assert flat.grad.abs().sum() > 0


def test_without_scale_and_angle_a_copy_is_the_image(monkeypatch):
    monkeypatch.setattr(views, "SCALE", 0.0)
    monkeypatch.setattr(views, "ANGLE", 0.0)
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(views.transformed(images, new_key(1)), images)


def test_a_copy_is_a_crop_inside_the_image(monkeypatch):
    monkeypatch.setattr(views, "ANGLE", 0.0)
    # A ramp from left to right: a crop of at least nine tenths shows a ramp less steep by that factor, with no pixel
    # outside the values of the image (edges repeat for half a pixel at most).
    ramp = torch.arange(32.0, dtype=torch.float64).expand(200, 1, 32, 32)
    seen = views.transformed(ramp, new_key(2))
    slope = seen[:, 0, 16, 20] - seen[:, 0, 16, 10]
    assert (slope <= 10 + 1e-9).all()
    assert (slope >= 9 - 1e-9).all()
    assert slope.std() > 0.1
    assert seen.min() >= 0
    assert seen.max() <= 31


def test_lifted_copies_are_those_of_single_calls():
    images, keys = torch.rand(3, 2, 1, 8, 8), torch.stack([new_key(i) for i in range(3)])
    lifted = torch.func.vmap(views.transformed)(images, keys)
    looped = torch.stack([views.transformed(own, key) for own, key in zip(images, keys, strict=True)])
    torch.testing.assert_close(lifted, looped)


def test_averaged_is_the_mean_over_copies():
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(views.averaged(lambda x: x.sum((1, 2, 3)), images, 0, new_key(0)), images.sum((1, 2, 3)))
    seen = []

    def score(copies):
        seen.append(copies)
        return copies.sum((1, 2, 3))

    mean = views.averaged(score, images, 4, new_key(0))
    assert len(seen) == 4
    torch.testing.assert_close(mean, torch.stack([c.sum((1, 2, 3)) for c in seen]).mean(0))
