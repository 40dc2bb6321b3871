"""Words that keys of needles are made of: an adjective and a noun, joined by a hyphen."""

_ADJECTIVES = """
    able amber ample ancient bitter blank bold brave brief bright brisk broad calm careful cheap chief civil clean
    clear clever cold common cool crisp curious damp dark deep dense distant double dry dull eager early east easy
    empty equal even exact faint fair false famous fast fierce final firm flat fond foreign fresh full gentle glad
    golden grand gray green happy harsh heavy hidden high hollow honest humble idle inner jolly keen kind large last
    late lazy light little lively local lonely long loose loud low loyal mild modern narrow neat noble north odd old
    open pale patient plain polite proud pure quick quiet rapid rare ready rich rigid ripe rough round royal rural
    sacred safe sharp shy silent simple slim slow small smooth social soft solid sour spare steady steep stiff still
    strange strict strong sudden sunny sweet swift tall tame tender thick thin tidy tiny tired tough true upper urban
    vague vast vivid warm weak west wet wide wild wise wooden young
"""
_NOUNS = """
    acorn anchor apple arrow attic badge bakery barrel basket beacon bell bench bicycle blanket boat bottle bridge
    broom bucket button cabin camera candle canyon carpet castle cellar chair chapel cherry circle clock cloud coast
    coin compass copper corner cottage cradle crayon crown curtain desert diary door drum eagle engine falcon farm
    feather fence ferry field fiddle flag flute forest fountain fox garden gate glacier glove goblet goose grain
    guitar hammer harbor hat hedge helmet hill horn horse hotel house island jacket jar jewel kettle key kitchen
    ladder lake lamp lantern leaf lemon letter library lighthouse lily linen lion lizard map maple market meadow mill
    mirror moon mountain needle nest oak ocean office olive orchard oven owl paddle palace paper path peach pencil
    pepper piano picture pigeon pillow planet plate pocket pond port puzzle quarry rabbit raft rail rain ribbon river
    road robin roof rope rose saddle sail salmon school scissors shadow shell shelf ship shirt shovel signal silver
    sparrow spoon spring square stable station stone stream street summer table temple tent thread tiger tower town
    train tree trumpet tunnel turtle valley velvet village violin wagon wall walnut water wheel willow window winter
    wolf wool yard
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
