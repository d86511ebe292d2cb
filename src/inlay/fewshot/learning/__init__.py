"""How a model learns from few labels: objectives, the loop, pseudo-labels, warm starts."""
