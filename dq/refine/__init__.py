"""Stages that change drawn images so that networks learn more from them: FADRM and Teddy.

A method is a pure function `refine(images, labels, weights, config, teachers, ...)` of one batch. Files, processes and
the order of stages are `dq.refine.stage`'s.
"""
