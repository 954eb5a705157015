#!/bin/sh
# Makes ldm/assets/embedded.safetensors from the corpus: parquet files of pictures with captions, in the folder $1.
#   sh configs/embedded/make.sh data/parquet
# `make weights` first. On two CPU cores: four hours for the autoencoders, six for the rest. Stopped, it goes on.
set -eu
corpus=$1
python=${PYTHON:-.venv/bin/python}
drawn="$corpus/fluent_emoji.parquet $corpus/twemoji.parquet $corpus/renders.parquet"
common='apples?(?! i)|pizza|sunflower|banana|t-shirt|sofa|couch|car|race car|horse|trees?|heart|hearts|smil\w*|house|cat|cat face|dog|dog face|fish|bird|butterfly|rose|star|sun|moon|mug|guitar|piano|boat|ship|bus|train|truck|bicycle|cake|hamburger|carrot|tomato|lemon|orange|grapes|strawberry|cherry|pumpkin|mushroom|cactus|umbrella|hat|shoe|clock|key|crown|rocket|snowman|ghost|robot|balloon|lion|tiger|elephant|panda|penguin|frog|turtle|rabbit|pig|cow|bear|owl|duck|chicken'
things='pizza|sunflower|strawberry|butterfly|elephant|panda|umbrella|grand piano|electric guitar|ferry|ketch|helicopter|lamp|chair|cup|soccer ball|dalmatian|rooster|flamingo|starfish|lotus|water lilly|bonsai|joshua tree'
asked="apples?|pizza|sunflower|banana|sofa|couch|car|race car|racing car|sports car|concept sedan|taxi|automobile|horse|trees?|hearts?|smil\w*|houses?|cat|cat face|dog|dog face|fish|bird|butterfly|rose|star|sun|moon|cup|mug|teacup|guitar|piano|boat|ship|sailboat|speedboat|bus|train|truck|bicycle|cake|hamburger|carrot|tomato|lemon|orange|grapes|strawberry|cherry|cherries|pumpkin|mushroom|cactus|umbrella|hat|shoes?|clock|key|crown|rocket|snowman|ghost|robot|balloon|lion|tiger|elephant|panda|penguin|frog|turtle|rabbit|pig|cow|bear|owl|duck|chicken|chair|armchair|table|bed|lamp|bottle|vase|door|bench|book|bowl|box|dress|t-shirt|shirt|jacket|helicopter|pineapple|pear|peach|tulip|tractor|van|motorcycle|scooter|airplane|bag|backpack|cabinet"
# The pairs under `new` in configs/evaluate/prompts.yaml, which no training picture may show.
new='(green|yellow).* car|(purple|pink).* (sofa|couch|(arm)?chair)|(blue|yellow).* apple|(red|green).* umbrella|(red|yellow).* bus|(orange|purple).* truck|(red|blue).* lamp|blue.* bed|(red|blue).* guitar|red.* table|blue.* (cup|mug|teacup)|red.* bottle|purple.* house|pink.* tree'
views='^(?!renders/)|/[017]$'  # of a render's eight views those from the front

prepare() {
    $python scripts/prepare_data.py "$@" --size 128 --holdout 0.02 --max-captions 3 \
        --caption-template "a {name}" --caption-template "a {colour} {name}" --caption-template "{colour} {name}"
}
styles() {
    prepare "$@" --max-captions renders:2 --caption-template "fluent_emoji:a {colour} {name}, 3d emoji" \
        --caption-template "twemoji:a {colour} {name}, flat emoji" --caption-template "renders:a 3d render of a {colour} {name}"
}
styles $drawn --out data/drawn
styles $drawn "$corpus/clipart.parquet" --out data/objects
styles $drawn "$corpus/clipart.parquet" --out data/common --match "^(an? )?(?!clothes )(\w+ )?($common)\$"
styles $drawn "$corpus/clipart.parquet" --out data/front --match-id "$views" --match "^(an? )?(?!clothes )(\w+ )?($asked)\$"
for seed in 1 2 3 4; do
    styles $drawn "$corpus/clipart.parquet" --out data/painted$seed --recolour $seed --match-id "$views" \
        --match "^(?!.*\b($new)s?\b)(a )?(\w+ )+($asked)\$"
done
prepare "$corpus/caltech101.parquet" --out data/things --match "^(an? )?($things)\$"
prepare "$corpus/fruits.parquet" "$corpus/flowers.parquet" "$corpus/clothing.parquet" "$corpus/satellite.parquet" \
    --out data/photos --limit-per-source 1600 --caption-template "clothing:a photo of a {colour} {name}"

$python scripts/train_vae.py configs/embedded/vae.yaml --run runs/vae
$python scripts/train_vae.py configs/embedded/decoder.yaml --run runs/plain
# Then the decoder alone, at twice the weight of LPIPS, on every kind of picture: the latents stay.
$python scripts/train_vae.py configs/embedded/decoder.yaml --run runs/decoder --weights runs/plain/model.safetensors --teacher "" \
    --freeze '["encoder.*"]' --loss.lpips 3 --loss.kl 0 --run.steps 1850 --run.seed 6 --data.seed 6 \
    --data.shards 'data/objects/{00000..00005}.tar::data/photos/{00000..00003}.tar::data/things/{00000..00003}.tar::data/things/{00000..00003}.tar'
# First at noise levels around t = 0.5, then mostly at high ones: there shape and colour are decided, and the prompt matters.
$python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/ldm1
$python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/ldm2 --weights runs/ldm1/model.safetensors \
    --schedule.mean 1.2 --schedule.std 1.2 --run.steps 2000 --optim.warmup 50 --optim.lr 5e-4
longer() {  # NAME BEFORE STEPS...: further, the rate up from nothing and down to it again
    name=$1 before=$2 steps=$3
    shift 3
    $python scripts/train_ldm.py configs/embedded/ldm.yaml --run runs/$name --weights runs/$before/model.safetensors \
        --schedule.mean 1.1 --schedule.std 1.3 --run.steps $steps --optim.warmup 100 --run.ema.decay 0.9995 "$@"
}
longer ldm3 ldm2 4800
longer ldm4 ldm3 4200
# Then two pictures in five of what most prompts ask for, from the front, a quarter of these in other colours than they have.
front='data/front/{00000..00005}.tar'
painted='data/painted1/{00000..00005}.tar::data/painted2/{00000..00005}.tar::data/painted3/{00000..00005}.tar::data/painted4/{00000..00005}.tar'
mixed="data/drawn/{00000..00004}.tar::data/photos/{00000..00003}.tar::data/things/{00000..00003}.tar\
::$front::$front::$front::$front::$front::$front::$painted"
longer ldm ldm4 5434 --data.shards "$mixed"
$python scripts/convert.py runs/ldm/model.safetensors ldm/assets/embedded.safetensors --to ldm --dtype int8 \
    --vae runs/decoder/model.safetensors
