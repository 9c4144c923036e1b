"""Rope scalings: how the angles of rotary position embedding are made to fit lengths past the trained one."""
