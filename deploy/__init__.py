"""Beyond one machine: images, BentoCloud, Kubernetes, Compose, Ray Serve.

Imports run one way: render -> kubernetes | compose | bentocloud | ray -> plan -> model_choice. What
is rendered follows from the RunnerConfig of the chosen models, as what is served does.
"""
