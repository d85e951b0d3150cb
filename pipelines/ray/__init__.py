"""This package handles Ray itself.

It has its life, logs and metrics, the resources of each stage, and work spread over a cluster.
"""
