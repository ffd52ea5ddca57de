"""Clients, jobs and engines. Engines never know the method; the method never knows the engine."""
