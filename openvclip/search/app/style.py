"""The style of the app's pages: the colours of the cards, in light and in dark."""

from __future__ import annotations

from openvclip.commands.pages import DARK, LIGHT
from openvclip.search.app.player import PLAYER_STYLE
from openvclip.search.cards import CARD_STYLE

__all__ = ["APP_STYLE"]

APP_STYLE = (
    f":root {{ {LIGHT} }}\n.dark {{ {DARK} }}\n"
    """\
:root { --color-accent: #2456a6 !important; }
.dark { --color-accent: #8fb4ef !important; }
.gradio-container { width: 100% !important; max-width: 76rem !important;
  margin: 0 auto !important; }
.gradio-container .html-container { padding: 0 !important; }
#upload .download { visibility: hidden; }
#library input { padding-right: 1.75rem; text-overflow: ellipsis; }
.ov-head { display: flex; flex-wrap: wrap; align-items: baseline; gap: .1rem .9rem;
  padding: .25rem 0 0; color: var(--ov-text); }
.ov-head h1 { margin: 0; font-size: 1.3rem; font-weight: 650; overflow-wrap: anywhere; }
.ov-head span { color: var(--ov-soft); font-size: .9rem; }
.ov-say { margin: .25rem 0 1rem; color: var(--ov-soft); font-size: .95rem; }
.ov-say.ov-wrong { padding: .7rem .9rem; border: 1px solid var(--ov-line); border-radius: 10px;
  border-left: 4px solid var(--ov-mark); background: var(--ov-card); color: var(--ov-text);
  overflow-wrap: anywhere; }
@media (max-width: 480px) { .gradio-container { padding: .5rem !important; } }
""" + CARD_STYLE + PLAYER_STYLE
)
