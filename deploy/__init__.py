"""Deployment beyond one machine: images, BentoCloud, Kubernetes, Compose, Ray Serve.

Imports run one way: render -> kubernetes | compose | bentocloud | ray_serve -> plan ->
model_choice. Manifests follow from the RunnerConfig of the chosen models, as serving does.
"""
