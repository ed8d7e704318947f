"""(a) The train and the inference step against PyTorch's, eager and compiled, interleaved.

    python experiments/benchmarks/step.py [lenet5 resnet20 ...] [--rounds=7] [--out=step.json]

The same network, uint8 batch and float32, SGD with momentum and an L2 penalty; the batch is on the device
already. PyTorch is channels_last, on a GPU with cuDNN's benchmark and TF32, which JAX has by default. There
our training runs ten steps a program; `fit` runs fifty. A line gives medians in milliseconds, our time over
the faster of PyTorch's two with its spread, seconds to compile, and two floors: the least time that the
convolutions' and products' FLOPs take at the rate of this machine's matrix products, and that the bytes that
the compiled step reads and writes take at the rate at which it reads and writes an array in place.
"""

import argparse
import json
import time

import pairs

# Network: (batch size on CPU, batch size on an accelerator, image size, channels, classes, our fields).
CASES = {
    'lenet5': (128, 1024, 28, 1, 10, {}),
    'resnet20': (128, 1024, 32, 3, 10, {}),
    'resnet18': (128, 1024, 32, 3, 10, {'stem': 'small'}),
    'wrn16_4': (128, 1024, 32, 3, 10, {}),
    'resnet50': (8, 128, 224, 3, 1000, {}),
    'mobilenet_v2': (8, 128, 224, 3, 1000, {'dropout': 0.0}),
}
SIDES = ('ours', 'eager', 'compile')
SECONDS = 0.5  # that a round should take at least
STEPS_PER_CALL = 10  # of our training on an accelerator, where `fit` has 50


def repeated(work, block):
    """The work so often that it takes long enough to time, and how often that is."""
    block(work())
    begin = time.perf_counter()
    block(work())
    count = max(1, round(SECONDS / (time.perf_counter() - begin)))

    def run():
        for _ in range(count):
            last = work()
        block(last)

    return run, count


def random_batch(name: str, accelerator: bool):
    import numpy as np

    on_cpu, on_accelerator, size, channels, classes, _ = CASES[name]
    batch = on_accelerator if accelerator else on_cpu
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, channels), np.uint8)
    return images, rng.integers(0, classes, batch, np.int32)


def case(name: str, precision: str):
    """The experiment of a case, and its batch on the host."""
    import jax

    from jaxcls import config as config_lib
    from jaxcls import experiment as experiment_lib

    images, labels = random_batch(name, jax.default_backend() != 'cpu')
    *_, classes, fields = CASES[name]
    config = config_lib.get_config()
    config.model = {'name': name, **fields}
    config.optimizer = {'name': 'sgd'}
    config.l2, config.augment, config.precision = 5e-4, [], precision
    channels = images.shape[-1]
    config.data.mean, config.data.std = (0.5,) * channels, (0.25,) * channels
    config.batch_size = len(images)
    config = experiment_lib.resolve(config)
    experiment = experiment_lib.build(config, images.shape[1:], classes, 10_000)
    rows = {'label': labels, 'index': labels, 'epoch': labels * 0, 'mask': labels >= 0}
    return experiment, {'image': images, **rows}


def repeat(train_step, count: int):
    """So many steps on the same batch as one program."""
    import jax

    if count == 1:
        return train_step

    def run(state, batch):
        state, sums = jax.lax.scan(lambda s, _: train_step(s, batch), state, length=count)
        return state, jax.tree.map(lambda x: x[-1], sums)

    return run


def ours(name: str, mode: str, precision: str):
    """Our step, as `fit` and `evaluate` compile it."""
    import jax
    import numpy as np

    from jaxcls import experiment as experiment_lib
    from jaxcls import inspection, sharding, steps

    experiment, batch = case(name, precision)
    mesh = sharding.make_mesh()
    like = experiment_lib.abstract_checkpoint(experiment, mesh)
    state = experiment_lib.initial_state(experiment, like[0])
    batch = jax.device_put(batch, sharding.split_batch(mesh))
    flops = inspection.count_flops(
        experiment.predict, steps.evaluation_variables(state), batch['image']
    )
    if mode == 'train':
        begin = time.perf_counter()
        places = jax.tree.map(lambda leaf: leaf.sharding, like)
        steps_per_call = 1 if jax.default_backend() == 'cpu' else STEPS_PER_CALL
        train = repeat(experiment.train_step, steps_per_call)
        step = jax.jit(train, donate_argnums=0, out_shardings=places)
        step = step.lower(state, batch).compile()
        seconds, flops = time.perf_counter() - begin, 3 * flops

        def work():
            nonlocal state
            state, sums = step(state, batch)
            return sums
    else:
        steps_per_call = 1
        variables = steps.evaluation_variables(state)
        begin = time.perf_counter()
        step = jax.jit(experiment.predict).lower(variables, batch['image']).compile()
        seconds = time.perf_counter() - begin

        def work():
            return step(variables, batch['image'])

    # Of a loop, XLA counts the body once.
    moved = step.cost_analysis().get('bytes accessed')
    run, count = repeated(work, jax.block_until_ready)
    parameters = sum(np.size(x) for x in jax.tree.leaves(state.params))
    about = {'parameters': parameters, 'compile': seconds, 'flops': flops, 'bytes': moved}
    about['units'] = count * steps_per_call
    return run, {**about, 'device': str(jax.devices()[0].device_kind), 'devices': mesh.size}


def theirs(name: str, mode: str, precision: str, compiled: bool):
    """PyTorch's step."""
    import peers
    import torch
    from torch.nn import functional as F

    cuda = torch.cuda.is_available()
    device = 'cuda' if cuda else 'cpu'
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision('high' if cuda else 'highest')
    images, labels = (torch.from_numpy(x).to(device) for x in random_batch(name, cuda))
    labels = labels.long()
    images = images.permute(0, 3, 1, 2)  # the bytes stay channels last
    model = getattr(peers, name)().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision != 'float32')
    forward = torch.compile(model) if compiled else model

    def predict():
        with autocast:
            return forward((images.float() / 255 - 0.5) / 0.25)

    def train():
        with autocast:
            loss = F.cross_entropy(forward((images.float() / 255 - 0.5) / 0.25), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def block(_):
        if cuda:
            torch.cuda.synchronize()

    begin = time.perf_counter()
    if mode == 'train':
        work = train
    else:
        model.eval()
        work = torch.inference_mode()(predict)
    block(work())
    seconds = time.perf_counter() - begin
    run, count = repeated(work, block)
    parameters = sum(p.numel() for p in model.parameters())
    return run, {'parameters': parameters, 'compile': seconds, 'units': count}


def rates(precision: str) -> dict[str, float]:
    """FLOP/s of matrix products, and bytes/s that are read and written in place, on the device."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == 'cpu' else 8192
    square = jnp.ones((size, size), 'float32' if precision == 'float32' else 'bfloat16')
    long = jnp.ones(2**26, jnp.float32)
    product = jax.jit(jnp.matmul)
    negative = jax.jit(jnp.negative, donate_argnums=0)

    def flip():
        nonlocal long
        long = negative(long)
        return long

    return {
        'flops': 2 * size**3 / _seconds(lambda: product(square, square)),
        'bytes': 2 * long.nbytes / _seconds(flip),
    }


def _seconds(work) -> float:
    """The best of seven rounds."""
    import jax

    run, count = repeated(work, jax.block_until_ready)
    found = []
    for _ in range(7):
        begin = time.perf_counter()
        run()
        found.append((time.perf_counter() - begin) / count)
    return min(found)


def compare(name: str, mode: str, args) -> dict:
    """Times our step and PyTorch's two."""
    commands = {
        side: [__file__, '--worker', side, name, '--mode', mode, '--precision', args.precision]
        for side in args.sides
    }
    row = pairs.summary(pairs.interleave(commands, args.rounds))
    return {'network': name, 'mode': mode, **row}


def line(row, sides, limits: dict[str, float]) -> str:
    """One row of the table."""
    cells = ''.join(f'{1000 * row[side]["median"]:>9.1f}' for side in sides)
    about = row[sides[0]]
    floors = ''.join(f'{1000 * about[k] / limits[k]:>8.1f}' for k in limits if about.get(k))
    ratio = pairs.show_ratio(row)
    return f'{row["network"]:<13}{row["mode"]:<8}{cells}  {ratio}{about["compile"]:>8.1f} s{floors}'


def main():
    """Times the pairs and prints, or is one of their workers."""
    from jaxcls import config

    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('networks', nargs='*', type=pairs.one_of(CASES), default=list(CASES))
    parser.add_argument('--mode', choices=['train', 'predict', 'both'], default='both')
    parser.add_argument('--precision', choices=config.PRECISIONS, default='float32')
    parser.add_argument('--rounds', type=pairs.at_least_1, default=7)
    parser.add_argument('--sides', type=pairs.some_of(SIDES), default=list(SIDES))
    parser.add_argument('--out', type=pairs.new_file, default=None)
    parser.add_argument('--worker', default='')
    args = parser.parse_args()
    if args.worker == 'rates':
        print(json.dumps(rates(args.precision)))
        return
    if args.worker:
        [name] = args.networks
        if args.worker == 'ours':
            pairs.serve(lambda: ours(name, args.mode, args.precision))
        else:
            compiled = args.worker == 'compile'
            pairs.serve(lambda: theirs(name, args.mode, args.precision, compiled))
        return
    command = [__file__, '--worker', 'rates', '--precision', args.precision]
    limits, rows = json.loads(pairs.last_line(command, 'rates')), []
    print('matrix products: {flops:.3g} FLOP/s; memory: {bytes:.3g} B/s'.format(**limits))
    heads = ''.join(f'{side:>9}' for side in args.sides)
    print(f'{"network":<13}{"step":<8}{heads}  {"ratio (spread)":<23}   compile   FLOPs   bytes')
    modes = ['train', 'predict'] if args.mode == 'both' else [args.mode]
    for mode in modes:
        for name in args.networks:
            rows.append(compare(name, mode, args))
            print(line(rows[-1], args.sides, limits), flush=True)
    if args.out:
        args.out.write_text(json.dumps({'rates': limits, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__':
    main()
