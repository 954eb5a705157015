#!/bin/sh
# Makes ldm/assets/embedded.safetensors from the corpus: parquet files of pictures with captions, in the folder $1.
#   sh configs/embedded/make.sh data/parquet
# `make weights` first. On two CPU cores: three hours for the autoencoders, four and a half for the rest. Stopped, it goes on.
set -eu
corpus=$1
python=${PYTHON:-.venv/bin/python}
drawn="$corpus/fluent_emoji.parquet $corpus/twemoji.parquet $corpus/renders.parquet"
common='apples?(?! i)|pizza|sunflower|banana|t-shirt|sofa|couch|car|race car|horse|trees?|heart|hearts|smil\w*|house|cat|cat face|dog|dog face|fish|bird|butterfly|rose|star|sun|moon|mug|guitar|piano|boat|ship|bus|train|truck|bicycle|cake|hamburger|carrot|tomato|lemon|orange|grapes|strawberry|cherry|pumpkin|mushroom|cactus|umbrella|hat|shoe|clock|key|crown|rocket|snowman|ghost|robot|balloon|lion|tiger|elephant|panda|penguin|frog|turtle|rabbit|pig|cow|bear|owl|duck|chicken'
things='pizza|sunflower|strawberry|butterfly|elephant|panda|umbrella|grand piano|electric guitar|ferry|ketch|helicopter|lamp|chair|cup|soccer ball|dalmatian|rooster|flamingo|starfish|lotus|water lilly|bonsai|joshua tree'

prepare() {
    $python scripts/prepare_data.py "$@" --size 128 --holdout 0.02 --max-captions 3 \
        --caption-template "a {name}" --caption-template "a {colour} {name}" --caption-template "{colour} {name}"
}
styles() {
    prepare "$@" --max-captions renders:2 --caption-template "fluent_emoji:a {colour} {name}, 3d emoji" \
        --caption-template "twemoji:a {colour} {name}, flat emoji" --caption-template "renders:a 3d render of a {colour} {name}"
}
styles $drawn --out data/drawn
styles $drawn "$corpus/clipart.parquet" --out data/common --match "^(an? )?(?!clothes )(\w+ )?($common)\$"
prepare "$corpus/caltech101.parquet" --out data/things --match "^(an? )?($things)\$"
prepare "$corpus/fruits.parquet" "$corpus/flowers.parquet" "$corpus/clothing.parquet" "$corpus/satellite.parquet" \
    --out data/photos --limit-per-source 1600 --caption-template "clothing:a photo of a {colour} {name}"

$python scripts/train_vae.py configs/embedded/vae.yaml --run runs/vae
$python scripts/train_vae.py configs/embedded/decoder.yaml --run runs/decoder
# First at noise levels around t = 0.5, then mostly at high ones: there shape and colour are decided, and the prompt matters.
$python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/ldm1
$python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/ldm2 --weights runs/ldm1/model.safetensors \
    --schedule.mean 1.2 --schedule.std 1.2 --run.steps 2000 --optim.warmup 50 --optim.lr 5e-4
before=runs/ldm2
for run in ldm3:4800 ldm:4200; do  # longer, each time up from nothing and down to it again
    $python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/${run%:*} --weights $before/model.safetensors \
        --schedule.mean 1.1 --schedule.std 1.3 --run.steps ${run#*:} --optim.warmup 100 --run.ema.decay 0.9995
    before=runs/${run%:*}
done
$python scripts/convert.py runs/ldm/model.safetensors ldm/assets/embedded.safetensors --to ldm --dtype int8 \
    --vae runs/decoder/model.safetensors
