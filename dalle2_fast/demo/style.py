"""How the page looks: fonts of the system, colours, and the rules of CSS that Gradio has no option for."""

from __future__ import annotations

import gradio as gr

FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
CSS = """
.gradio-container {width: 100% !important; max-width: 1240px !important; margin: 0 auto !important}
.html-container {padding: 0 !important}
.d2-header {display: flex; align-items: baseline; gap: 6px 20px; flex-wrap: wrap; padding: 2px 0 6px}
.d2-header h1 {font-size: 24px; font-weight: 700; letter-spacing: -.02em; margin: 0}
.d2-header ul {display: flex; flex-wrap: wrap; gap: 2px 16px; list-style: none; margin: 0; padding: 0;
    color: var(--body-text-color-subdued); font-size: 13px}
.d2-header li + li::before {content: "·"; margin-right: 16px}
.d2-purpose {margin: 0; color: var(--body-text-color-subdued); font-size: 14px; line-height: 1.45}
.d2-error {margin: -6px 0 0; padding: 8px 12px; border-left: 3px solid #dc2626; border-radius: 4px;
    background: color-mix(in srgb, #dc2626 9%, transparent); font-size: 14px; line-height: 1.4;
    overflow-wrap: anywhere}
.d2-empty {display: grid; place-items: center; min-height: 420px; border-radius: 12px; font-size: 14px;
    border: 1px dashed var(--border-color-primary); color: var(--body-text-color-subdued)}
.d2-preview {display: grid; gap: 8px}
.d2-preview > div {display: grid; gap: 2px; aspect-ratio: 1; align-content: center; overflow: hidden;
    border-radius: 8px; border: 1px solid var(--border-color-primary);
    background: var(--block-background-fill)}
.d2-preview img {width: 100%; display: block}
.d2-progress {display: grid; grid-template-columns: 190px 1fr; align-items: center; gap: 12px;
    font-size: 13px; font-variant-numeric: tabular-nums; color: var(--body-text-color-subdued)}
.d2-bar, .d2-stack {height: 8px; border-radius: 4px; overflow: hidden; display: flex;
    background: var(--background-fill-secondary)}
.d2-bar i {background: var(--color-accent); transition: width .15s linear}
.d2-seconds ul {display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; padding: 0; margin: 8px 0 0;
    font-size: 13px; color: var(--body-text-color-subdued)}
.d2-seconds li span {font-variant-numeric: tabular-nums; color: var(--body-text-color)}
.d2-seconds b {display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 5px}
.d2-stage0 {background: #94a3b8} .d2-stage1 {background: #0ea5e9} .d2-stage2 {background: #4f46e5}
.d2-stage3 {background: #d946ef} .d2-stage4 {background: #f59e0b} .d2-stage5 {background: #10b981}
.d2-rest {background: #cbd5e1}
.d2-note {margin: 6px 0 0; font-size: 13px; color: var(--body-text-color-subdued)}
.d2-words {display: grid; grid-template-columns: 116px 1fr; gap: 6px 10px; margin: 0; font-size: 13px}
.d2-words dt {color: var(--body-text-color-subdued); padding-top: 3px}
.d2-words dd {margin: 0; display: flex; flex-wrap: wrap; gap: 4px}
.d2-word {padding: 1px 8px; border-radius: 10px; border: 1px solid var(--border-color-primary);
    background: var(--background-fill-secondary); color: var(--body-text-color); font-size: 13px;
    font-weight: 400; line-height: 1.5; margin: 0 !important; cursor: pointer}
.d2-examples {display: flex; flex-wrap: wrap; gap: 6px; font-size: 13px; align-items: center}
.d2-examples span {color: var(--body-text-color-subdued); margin-right: 2px}
.d2-example {padding: 2px 10px; border-radius: 8px; border: 1px solid var(--border-color-primary);
    background: var(--block-background-fill); color: var(--body-text-color); font-size: 13px;
    font-weight: 400; text-align: left; margin: 0 !important; cursor: pointer}
.d2-example:hover, .d2-example:focus-visible {border-color: var(--color-accent); color: var(--color-accent)}
#words {max-height: 340px; overflow-y: auto}
.d2-word:hover, .d2-word:focus-visible {border-color: var(--color-accent); color: var(--color-accent)}
.d2-rules {margin: 10px 0 0; padding-left: 18px; font-size: 13px; color: var(--body-text-color-subdued)}
.d2-use {gap: 6px !important; flex-wrap: wrap} .d2-use button {flex: 0 0 auto; min-width: 0}
.thumbnail-lg {display: flex !important; flex-direction: column; aspect-ratio: auto !important;
    height: auto !important}
.thumbnail-lg img {aspect-ratio: 1; height: auto !important}
.thumbnail-lg .caption-label {position: static !important; max-width: none !important; width: 100%;
    padding: 5px 4px !important; border: 0 !important; box-shadow: none !important; text-align: center}
.grid-wrap {max-height: none !important; min-height: 0 !important}
@media (prefers-reduced-motion: reduce) {.d2-bar i {transition: none}}
"""


def theme() -> gr.themes.Base:
    """Gradio's base theme without fonts of other hosts."""
    return gr.themes.Base(
        primary_hue="indigo", neutral_hue="slate", radius_size="md", font=FONT, font_mono=MONO
    ).set(body_background_fill="*neutral_50", block_label_text_weight="500")
