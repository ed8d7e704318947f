"""(c) Input alone: images/s of our resident and streamed splits, PyTorch's DataLoader and tf.data.

    python experiments/benchmarks/reading.py [cifar10 photos] [--photos=DIR] [--rounds=7] [--out=reading.json]

CIFAR-10 with shifts and flips, 128 a batch, and a folder of photos (one directory a class) with random
crops to 128 pixels and flips, 32 a batch. Nobody trains: batches are made, augmented and normalised, on
the device. All use two worker processes, but resident splits, which need none.
"""

import argparse
import functools
import importlib.util
import json
from pathlib import Path

import pairs
import program

BATCHES = {'cifar10': 40, 'photos': 10}  # in a round
BATCH_SIZE = {'cifar10': 128, 'photos': 32}
SIZE = {'cifar10': 32, 'photos': 128}


def config_of(case: str, photos: str, pipeline: str):
    """Our config."""
    from jaxcls import config as config_lib
    from jaxcls import experiment, study

    config = config_lib.get_config()
    config.model, config.batch_size = {'name': 'linear'}, BATCH_SIZE[case]
    config.data.update(mean=(0.5,) * 3, std=(0.25,) * 3, pipeline=pipeline, workers=2)
    if case == 'cifar10':
        config.data.update(name='tfds:cifar10', train='train')
        config.augment = study.CROP_AND_FLIP
    else:
        config.data.update(name=f'folder:{photos}', image_size=128, crop='random_resized')
        config.augment = [{'name': 'flip'}]
    return experiment.resolve(config)


def ours(case: str, photos: str, pipeline: str):
    """Batches as the train step gets them."""
    import jax

    from jaxcls import augment, sharding, steps
    from jaxcls import experiment as experiment_lib
    from jaxcls import pipeline as pipeline_lib

    config, mesh = config_of(case, photos, pipeline), sharding.make_mesh()
    reader, _, data = experiment_lib.open_data(config)
    count, examples = BATCHES[case], data['examples'][config.data.train]
    order = functools.partial(pipeline_lib.training_order, 0, examples, config.batch_size)
    feed = experiment_lib.make_feed(config, reader, order, mesh, 10**6, train=True)
    change = augment.make_augment(config.augment)
    prepare = steps.make_prepare(
        change, config.data.mean, config.data.std, len(data['class_names']), 'float32'
    )

    @jax.jit
    def make(data, items, step):
        batch = feed.fetch(data, jax.tree.map(lambda x: x[0], items))
        return prepare(jax.random.key(step), batch, None)['image']

    at = 0

    def run():
        nonlocal at
        for _ in range(count):
            last = make(feed.data, feed.items(at, 1), at)
            at += 1
        jax.block_until_ready(last)

    run()
    return run, {'units': count * config.batch_size}


def torch_loader(case: str, photos: str):
    """torchvision's transforms and two DataLoader workers."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    if case == 'cifar10':
        loader, _ = program.torch_batches('resnet20')
    else:
        scale = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
        change = [v2.RandomResizedCrop(128), v2.RandomHorizontalFlip(), v2.PILToTensor(), *scale]
        loader = torch.utils.data.DataLoader(
            torchvision.datasets.ImageFolder(photos, v2.Compose(change)),
            BATCH_SIZE[case], shuffle=True, num_workers=2, persistent_workers=True, drop_last=True,
        )  # fmt: skip
    batches = pairs.forever(loader)

    def run():
        for _ in range(BATCHES[case]):
            next(batches)

    run()
    return run, {'units': BATCHES[case] * BATCH_SIZE[case]}


def tf_data(case: str, photos: str):
    """tf.data with its own decoder and random crops."""
    import tensorflow as tf

    size, batch_size = SIZE[case], BATCH_SIZE[case]
    if case == 'cifar10':
        data = tf.data.Dataset.from_tensor_slices(program.arrays('resnet20')[0])
    else:
        data = tf.data.Dataset.list_files(f'{photos}/*/*')

    def change(image):
        if case == 'cifar10':
            image = tf.image.random_crop(tf.pad(image, [[4, 4], [4, 4], [0, 0]]), [size, size, 3])
        else:
            image = tf.io.decode_jpeg(tf.io.read_file(image), channels=3)
            begin, extent, _ = tf.image.sample_distorted_bounding_box(
                tf.shape(image), tf.zeros([0, 0, 4]), area_range=(0.08, 1.0),
                aspect_ratio_range=(3 / 4, 4 / 3), use_image_if_no_bounding_boxes=True,
            )  # fmt: skip
            # Antialiased, as Pillow's is, which the others use.
            image = tf.image.resize(tf.slice(image, begin, extent), [size, size], antialias=True)
        image = tf.image.random_flip_left_right(image)
        return (tf.cast(image, tf.float32) / 255 - 0.5) / 0.25

    data = data.repeat().shuffle(10_000).map(change, tf.data.AUTOTUNE)
    batches = iter(data.batch(batch_size).prefetch(tf.data.AUTOTUNE))

    def run():
        for _ in range(BATCHES[case]):
            next(batches)

    run()
    return run, {'units': BATCHES[case] * batch_size}


SIDES = {
    'resident': functools.partial(ours, pipeline='resident'),
    'stream': functools.partial(ours, pipeline='stream'),
    'torch': torch_loader,
    'tf.data': tf_data,
}


def main():
    """Times the readers and prints, or is one of them."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('cases', nargs='*', type=pairs.one_of(BATCHES), default=['cifar10'])
    parser.add_argument('--photos', default='', help='a folder with a directory a class')
    parser.add_argument('--rounds', type=pairs.at_least_1, default=7)
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', default='')
    args = parser.parse_args()
    if 'photos' in args.cases and not Path(args.photos or 'none').is_dir():
        parser.error(f'--photos={args.photos} is no folder; give one with a directory a class')
    if args.worker:
        [case] = args.cases
        pairs.serve(lambda: SIDES[args.worker](case, args.photos))
        return
    rows, missing = [], [] if importlib.util.find_spec('tensorflow') else ['tf.data']
    for case in args.cases:
        # Photos are cropped at random from the files, which a resident split cannot be.
        sides = [s for s in SIDES if s not in missing and (case, s) != ('photos', 'resident')]
        extra = ['--photos', args.photos]
        commands = {side: [__file__, case, *extra, '--worker', side] for side in sides}
        row = {'case': case, **pairs.summary(pairs.interleave(commands, args.rounds))}
        rows.append(row)
        cells = '  '.join(f'{side} {1 / row[side]["median"]:,.0f}' for side in sides)
        print(f'{case:<9}{cells}  images/s', flush=True)
    if missing:
        print('TensorFlow is not installed: tf.data is left out.')
    if args.out:
        args.out.write_text(json.dumps({'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
