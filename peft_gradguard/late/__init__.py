"""Calls that come after ``zero_grad``: the optimizer's gradients are lent to them."""
