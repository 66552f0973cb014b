"""Own logs as a person might bring them: three files, and the recipe that the README shows."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
SHOWN = README.split("```yaml\n")[1].split("```")[0]

# The README's recipe, with sizes and steps for a log of a few thousand rows.
OWN_LOGS = (
    SHOWN[: SHOWN.index("model:")]
    + """\
model: {layers: [small, small, small], codebooks: [6, 4]}
train: {epochs: 1, batch_size: 128, refresh_steps: 10, lr: 0.01}
search: {widths: [4, 12], k: 20, max_k: 100, requests: 60}
"""
)


def write_logs(folder: Path, users: int = 150, items: int = 200, rows: int = 4000) -> Path:
    """Three tables and the recipe; clicks follow category and country. Returns the recipe's path."""
    rng = np.random.default_rng(3)
    countries = np.array(["IT", "DE", "FR", "ES"])
    country = rng.integers(0, 4, users)
    category = rng.integers(0, 8, items)
    u, i = rng.integers(0, users, rows), rng.integers(0, items, rows)
    click = (rng.random(rows) < 1 / (1 + np.exp(1.5 - 3.0 * (category[i] % 4 == country[u])))).astype(
        np.int64
    )
    impressions = {
        "user_id": u, "sku": 1000 + i, "time": np.arange(rows),
        "click": click, "buy": click * (rng.random(rows) < 0.3),
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    pa.parquet.write_table(pa.table(impressions), folder / "impressions.parquet")
    people = pa.table(
        {"user_id": np.arange(users), "age": rng.random(users) * 60, "country": countries[country]}
    )
    pa.csv.write_csv(people, folder / "users.csv")
    categories = [[f"c{c}", f"group{c // 4}"] for c in category]
    things = pa.table({"sku": 1000 + np.arange(items), "category": categories, "price": rng.random(items)})
    pa.parquet.write_table(things, folder / "items.parquet")
    recipe = folder / "shop.yaml"
    recipe.write_text(OWN_LOGS)
    return recipe
