"""Modules for training from scratch: attention through proxy tokens and through agent tokens, in plain PyTorch."""

from visparse.nn.agent import AgentAttention
from visparse.nn.proxy_token import ProxyInjection, ProxyTokenAttention, WindowAttention

__all__ = ["AgentAttention", "ProxyInjection", "ProxyTokenAttention", "WindowAttention"]
