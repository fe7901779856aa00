"""How applications are brought to stand still for an instant."""
